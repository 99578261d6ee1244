"""The process in which rewards run: `python -m verst.rewards.worker SOCKET_FD PARENT_PID`.

User code has the main thread (signals work there), its own standard output, and nothing of the protocol: that goes over the inherited
socket. In: frames of 8 bytes of length (big endian) and a pickle; first (`RewardSpec`, deadline), then (number, fields, trajectories). Out:
lines of JSON; first whether the reward loaded, then for each request one when it begins and one for each trajectory as soon as it is
scored, so that whoever waits knows what it waits for. A plain reward takes one request after the other, an async one all that come.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import inspect
import json
import math
import numbers
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from verst.errors import DeadlineExceeded, RewardFailure, VerstError
from verst.extend import is_async, origin
from verst.rewards.metrics import recording
from verst.types import Trajectory

HEADER = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_ERROR_CHARS = 500


class NotANumber(RewardFailure):
    """A reward returned something that cannot be a score."""


class Worker:
    """Serves one socket until it closes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._replies: IO[bytes] = connection.makefile("wb")
        self._runner = asyncio.Runner()  # one event loop for the worker's life: clients opened by an async reward stay usable

    def serve(self) -> None:
        """Loads the reward, says so, then scores what arrives. Returns when the parent closes the socket."""
        spec, self._deadline_s = self._receive()
        reward, error = _attempt(spec.open)
        if error is not None:
            self._send(error=str(error) if isinstance(error, VerstError) else origin(error), kind=type(error).__name__)
            return
        self._reward: Callable[..., Any] = reward
        concurrent = is_async(reward)
        self._send(concurrent=concurrent)
        with self._runner:
            if concurrent:
                self._runner.run(self._score_together())
                return
            while (request := self._receive()) is not None:
                self._score_in_order(*request)

    def _score_in_order(self, number: int, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        self._send(number=number, begun=True)
        for index, trajectory in enumerate(trajectories):
            with recording() as recorded:
                reward, error = _attempt(partial(self._score, trajectory, fields))
            self._report(number, index, recorded, reward, error)

    def _score(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        value = self._reward(trajectory, fields)
        if inspect.isawaitable(value):  # in this context: the runner has one of its own, in which nothing would be recorded
            value = self._runner.run(_wait_for(value), context=contextvars.copy_context())
        return _number(value)

    async def _score_together(self) -> None:
        """Async rewards mostly wait (for a judge, a sandbox), so all that have come wait at the same time."""
        loop, arrived, running = asyncio.get_running_loop(), asyncio.Queue[Any](), set[asyncio.Task[None]]()

        def receive() -> None:
            while (request := self._receive()) is not None:
                loop.call_soon_threadsafe(arrived.put_nowait, request)
            loop.call_soon_threadsafe(arrived.put_nowait, None)

        # a daemon, and a thread of its own: the reward may use up those of the loop, and the process may have to end in the middle
        threading.Thread(target=receive, daemon=True).start()
        while (request := await arrived.get()) is not None:
            number, fields, trajectories = request
            for index, trajectory in enumerate(trajectories):
                task = asyncio.create_task(self._score_one(number, index, trajectory, fields))
                running.add(task)
                task.add_done_callback(running.discard)

    async def _score_one(self, number: int, index: int, trajectory: Trajectory, fields: Mapping[str, Any]) -> None:
        self._send(number=number, begun=True)
        with recording() as recorded:
            scoring = asyncio.ensure_future(self._score_async(trajectory, fields))
        await asyncio.wait({scoring})
        error = RewardFailure("cancelled itself") if scoring.cancelled() else scoring.exception()
        self._report(number, index, recorded, scoring.result() if error is None else None, error)

    async def _score_async(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        limit = asyncio.timeout(self._deadline_s)
        try:
            async with limit:
                return _number(await self._reward(trajectory, fields))
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceeded(f"exceeded {self._deadline_s:g} s: make it faster, or raise reward.deadline_s") from error
            raise
        except SystemExit as leaving:  # now: the loop would cancel the others first, as if they had failed too
            sys.stdout.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else bool(leaving.code))

    def _report(self, number: int, index: int, recorded: Mapping[str, float], reward: float | None, error: BaseException | None) -> None:
        reply: dict[str, Any] = {"number": number, "index": index, "recorded": dict(recorded)}  # a thread of the reward may still record
        if error is None:
            self._send(**reply, reward=reward)
        else:
            self._send(**reply, error=_described(error), reason=_reason(error))

    def _receive(self) -> Any:
        """The next frame; None when the parent has closed the socket."""
        header = self._read(HEADER.size)
        payload = None if header is None else self._read(*HEADER.unpack(header))
        return None if payload is None else pickle.loads(payload)

    def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            part = self._connection.recv(min(size - len(data), 2**20))
            if not part:
                return None
            data += part
        return bytes(data)

    def _send(self, **reply: Any) -> None:
        self._replies.write(json.dumps(reply).encode() + b"\n")
        self._replies.flush()


def _attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The one place where user code is called: whatever it raises is a fact about the reward, reported with the trajectory it hit.

    `SystemExit` and the like are let through: the process ends, and the parent reports that.
    """
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - see above
        return None, error


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real | np.bool_):
        raise NotANumber(f"returned {str(value)[:60]!r} of type {type(value).__name__}, not a number: return one")
    number = float(value)
    if not math.isfinite(number):
        raise NotANumber(f"returned {number}, not a finite number: return one")
    return number


def _described(error: BaseException) -> str:
    if isinstance(error, NotANumber | DeadlineExceeded):
        return str(error)[:_ERROR_CHARS]
    return (f"failed: {error}" if isinstance(error, RewardFailure) else f"raised {origin(error)}")[:_ERROR_CHARS]


def _reason(error: BaseException) -> str:
    if isinstance(error, NotANumber):
        return "not_a_number"
    return "deadline" if isinstance(error, DeadlineExceeded) else "exception"


def _die_with_parent(parent: int, connection: socket.socket) -> None:
    """Ends this process when its parent does, even by SIGKILL and even while user code never returns.

    The kernel's signal covers code stuck outside the interpreter, on Linux; the watcher covers other systems and an orderly close.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(connection, 0)  # hang-up is always reported, and data never wakes it
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    _die_with_parent(int(sys.argv[2]), connection)
    Worker(connection).serve()


if __name__ == "__main__":
    main()
