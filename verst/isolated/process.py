"""The parent's end of a process that runs user code: starts it, reads what it says, and sees to it that it is gone."""

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
from typing import Any, Self

from verst.errors import DeadlineExceeded, ExtensionError
from verst.isolated.served import HEADER
from verst.secrets import environment, without_secrets

START_DEADLINE_S = 120.0
"""Limit of loading the user's object: a module may load a model."""

_GRACE_S = 0.2
_END_S = 10.0


class IsolatedProcess:
    """It has a process group of its own, ended as a whole, so that what user code started ends too. Its output goes to `log` or stderr."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Path | None
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._log = log
        self._buffer = b""
        self._killed = False

    @classmethod
    async def launch(cls, module: str, log: Path | None, secrets: Sequence[str] = (), *, gpus: bool = False) -> Self:
        """`python -m MODULE SOCKET_FD PARENT_PID`. `secrets`: environment variables that it needs though their names speak of secrets.

        `gpus`: it may use those of this process.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            return cls(_popen(module, theirs.fileno(), log, worker_environment(environment(), secrets, gpus=gpus)), reader, writer, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def load(self, message: Any, what: str) -> dict[str, Any]:
        """Sends what the process has to load, and returns its first reply; `what` names that in errors.

        Raises `ExtensionError` with the reason if it cannot be loaded, `DeadlineExceeded` if that takes too long. Then it has ended.
        """
        try:
            return await self._loaded(message, what)
        except BaseException:  # a cancelled start too must leave no process behind
            self.kill()
            raise

    async def _loaded(self, message: Any, what: str) -> dict[str, Any]:
        await self.send(message)
        try:
            reply = await self.receive(START_DEADLINE_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what}: its worker did not load it within {START_DEADLINE_S:g} s") from error
        if reply is None:
            raise ExtensionError(f"{what}: its worker {await self.ended()} while loading it; its output is in {self.output}")
        if "error" in reply:
            prefix = "" if reply["kind"] == ExtensionError.__name__ else f"{what} could not be made: "
            raise ExtensionError(prefix + reply["error"])
        return reply

    @property
    def output(self) -> str:
        """Where what it prints is found."""
        return str(self._log or "stderr")

    async def send(self, message: Any) -> None:
        """One frame to the process."""
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._writer.write(HEADER.pack(len(payload)) + payload)
            await self._writer.drain()
        except ConnectionError:
            return  # it died: the next `receive` says so

    async def receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next reply, None if the process is gone. Raises `TimeoutError` after `limit_s`."""
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


def _popen(module: str, fd: int, log: Path | None, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "faulthandler", "-m", module, str(fd), str(os.getpid())]
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if log else os.dup(2)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(fd,),
            env=env,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent only, which ends its workers in order
        )
    finally:
        os.close(output)


def worker_environment(environment: Mapping[str, str], secrets: Sequence[str] = (), *, gpus: bool = False) -> dict[str, str]:
    """What a worker may see: all but GPUs and variables whose name speaks of a secret, unless it needs them (`gpus`, `secrets`).

    Modules are found where this process finds them.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    devices = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # the GPU that a replica has is the engine's, memory and all
    return without_secrets(environment, secrets) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | devices
