"""The parent's end of one reward worker: starts it, talks to it, and sees to it that it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verst.errors import DeadlineExceeded, ExtensionError
from verst.rewards.spec import RewardSpec
from verst.rewards.worker import HEADER
from verst.types import Trajectory

START_DEADLINE_S = 120.0
"""Limit of importing the reward: a module may load a model."""

_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_GRACE_S = 0.2
_END_S = 10.0
_ASYNC_GRACE_S = 1.0
"""An async reward's deadline is kept inside the worker; this much later the worker itself is judged to be stuck."""


class Death(NamedTuple):
    """Why a worker cannot be used any more. `began`: its request was under way. `outside`: somebody killed it, such as the kernel."""

    reason: str
    words: str
    began: bool
    outside: bool = False


class RewardProcess:
    """A worker that has loaded its reward. It has a process group of its own, ended as a whole, so that what a reward started ends too.

    `concurrent` says that all trajectories that are with it are scored at the same time (the reward is async), else in order.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        deadline_s: float,
        log: Path | None,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._deadline_s, self._log = deadline_s, log
        self._buffer = b""
        self._killed = False
        self.concurrent = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @classmethod
    async def start(cls, spec: RewardSpec, deadline_s: float, log: Path | None) -> RewardProcess:
        """Raises `ExtensionError` with the reason if the reward cannot be loaded, `DeadlineExceeded` if that takes too long."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            worker = cls(_launch(theirs.fileno(), log, spec.secrets), reader, writer, deadline_s, log)
        try:
            await worker._load(spec)
        except BaseException:  # a cancelled start too must leave no process behind
            worker.kill()
            raise
        return worker

    async def _load(self, spec: RewardSpec) -> None:
        await self._send((spec, self._deadline_s))
        try:
            reply = await self.receive(START_DEADLINE_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"reward {spec.name}: its worker did not load it within {START_DEADLINE_S:g} s") from error
        if reply is None:
            raise ExtensionError(
                f"reward {spec.name}: its worker {await self.ended()} while loading it; its output is in {self._log or 'stderr'}"
            )
        if "error" in reply:
            prefix = "" if reply["kind"] == ExtensionError.__name__ else f"reward {spec.name} could not be made: "
            raise ExtensionError(prefix + reply["error"])
        self.concurrent = reply["concurrent"]

    async def request(self, number: int, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Replies come with this number: one when the request begins, and one for each trajectory."""
        await self._send((number, fields, trajectories))

    async def reply(self, *, began: bool = False) -> dict[str, Any] | Death:
        """The next reply, or why there will be none. `began`: what the death then says of the request."""
        try:
            reply = await self.receive(self._deadline_s + (_ASYNC_GRACE_S if self.concurrent else 0))
        except TimeoutError:
            return Death("deadline", f"exceeded {self._deadline_s:g} s: make it faster, or raise reward.deadline_s", began)
        if reply is None:
            how = await self.ended()
            words = f"broke: its process {how}; what it printed is in {self._log or 'stderr'}"
            return Death("crash", words, began, outside=how.endswith(signal.SIGKILL.name))
        return reply

    async def receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next reply, None if the worker is gone. Raises `TimeoutError` after `limit_s`."""
        while b"\n" not in self._buffer:
            data = await self._read(limit_s)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def ended(self) -> str:
        """How the process ended, in words. Ends it if it only closed its socket."""
        for _ in range(100):
            if not self.alive:
                break
            await asyncio.sleep(0.01)
        code = self._process.poll()
        self.kill()
        if code is None:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """Ends the process group and waits for that, without giving way to other tasks: so it is complete in a cancelled task too."""
        if self._killed:
            return  # the number may belong to another group by now
        self._killed = True
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)  # milliseconds, unless a driver holds the process

    async def _send(self, message: Any) -> None:
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._writer.write(HEADER.pack(len(payload)) + payload)
            await self._writer.drain()
        except ConnectionError:
            return  # it died: the next `receive` says so

    async def _read(self, limit_s: float) -> bytes:
        # Where this event loop itself was held up past the limit, the reply may lie in the socket: look once more before judging.
        for wait_s in (limit_s, _GRACE_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    try:
                        return await self._reader.read(2**16)
                    except ConnectionError:
                        return b""
        raise TimeoutError


def _launch(fd: int, log: Path | None, secrets: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "faulthandler", "-m", "verst.rewards.worker", str(fd), str(os.getpid())]
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if log else os.dup(2)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(fd,),
            env=worker_environment(os.environ, secrets),
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent only, which ends its workers in order
        )
    finally:
        os.close(output)


def worker_environment(environment: Mapping[str, str], secrets: Sequence[str] = ()) -> dict[str, str]:
    """What a worker may see: all but GPUs and variables whose name speaks of a secret, unless a shipped reward needs them (`secrets`).

    Modules are found where this process finds them.
    """
    hidden = {name for name in environment if any(word in name.upper() for word in _SECRET_WORDS)} - {*secrets}
    kept = {name: value for name, value in environment.items() if name not in hidden}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # the GPU that this process may have is the engine's, memory and all
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
