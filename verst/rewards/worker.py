"""The process in which rewards run: `python -m verst.rewards.worker SOCKET_FD PARENT_PID`.

User code has the main thread (signals work there), its own standard output, and nothing of the protocol: that goes over the inherited
socket. In: frames of 8 bytes of length (big endian) and a pickle; first (`RewardSpec`, deadline), then (fields, trajectories). Out: lines
of JSON; first whether the reward loaded, then for each request one when it begins and one for each trajectory as soon as it is scored, so
that whoever waits knows what it waits for.
"""

from __future__ import annotations

import asyncio
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
from typing import IO, Any, cast

import numpy as np

from verst.errors import DeadlineExceeded, RewardFailure, VerstError
from verst.extend import origin
from verst.types import Trajectory

HEADER = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_ERROR_CHARS = 500


class NotANumber(RewardFailure):
    """A reward returned something that cannot be a score."""


class Worker:
    """Serves one socket until it closes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._runner = asyncio.Runner()  # one event loop for the worker's life: clients opened by an async reward stay usable

    def serve(self) -> None:
        """Loads the reward, says so, then scores what arrives. Returns when the parent closes the socket."""
        spec, self._deadline_s = self._receive()
        reward, error = _attempt(spec.build)
        if error is not None:
            self._send(error=str(error) if isinstance(error, VerstError) else origin(error), kind=type(error).__name__)
            return
        self._reward: Callable[..., Any] = reward
        concurrent = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004
        self._send(concurrent=concurrent)
        with self._runner:
            while (request := self._receive()) is not None:
                self._send(begun=True)
                if concurrent:
                    self._runner.run(self._score_together(*request))
                else:
                    self._score_in_order(*request)

    def _score_in_order(self, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        for index, trajectory in enumerate(trajectories):
            self._report(index, *_attempt(partial(self._score, trajectory, fields)))

    def _score(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        value = self._reward(trajectory, fields)
        return _number(self._runner.run(_wait_for(value)) if inspect.isawaitable(value) else value)

    async def _score_together(self, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Async rewards mostly wait (for a judge, a sandbox), so those of one request wait at the same time."""

        def report(index: int, task: asyncio.Task[float]) -> None:
            error = RewardFailure("cancelled itself") if task.cancelled() else task.exception()
            self._report(index, task.result() if error is None else None, error)

        tasks = [asyncio.create_task(self._score_async(trajectory, fields)) for trajectory in trajectories]
        for index, task in enumerate(tasks):
            task.add_done_callback(partial(report, index))
        await asyncio.wait(tasks)

    async def _score_async(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        limit = asyncio.timeout(self._deadline_s)
        try:
            async with limit:
                return _number(await self._reward(trajectory, fields))
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceeded(f"exceeded {self._deadline_s:g} s: make it faster, or raise reward.deadline_s") from error
            raise

    def _report(self, index: int, reward: float | None, error: BaseException | None) -> None:
        if error is None:
            self._send(index=index, reward=reward)
        else:
            self._send(index=index, error=_described(error), reason=_reason(error))

    def _receive(self) -> Any:
        header = self._stream.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        return pickle.loads(self._stream.read(*HEADER.unpack(header)))

    def _send(self, **reply: Any) -> None:
        self._stream.write(json.dumps(reply).encode() + b"\n")
        self._stream.flush()


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
    Worker(cast("IO[bytes]", connection.makefile("rwb"))).serve()


if __name__ == "__main__":
    main()
