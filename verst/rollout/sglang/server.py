"""One SGLang server as a process of this engine: started, watched and ended with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from verst.errors import EngineFailure
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.arguments import tensor_ranks
from verst.rollout.sglang.environment import MARKER, server_environment

_TAIL_LINES = 15
_TAIL_BYTES = 64 * 1024
_POLL_S = 0.2
_TRACKER_S = 2.0
_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")


class ServerProcess:
    """A server on 127.0.0.1, at a port that the system chose, with an API key that only this object knows.

    `log` takes all that it prints. Beside it lies a record (`LOG.server.json`: process id, start time, marker) by which the next engine
    with the same log finds and ends a server that outlived its engine.
    """

    def __init__(self, arguments: Mapping[str, Any], *, device: str, log: Path) -> None:
        self._arguments, self._device, self._log = dict(arguments), device, log
        self._record = log.with_name(log.name + ".server.json")
        self.api_key = secrets.token_urlsafe(32)
        self._process: asyncio.subprocess.Process | None = None
        self._port: socket.socket | None = None

    async def start(self, deadline_s: float) -> ServerApi:
        """Returns when the server serves. Raises `EngineFailure` with its last log lines if it ends, or is not up in time."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(end_orphans, self._record)
        self._port = _reserved_port()
        port = self._port.getsockname()[1]
        marker = secrets.token_hex(16)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "verst.rollout.sglang.launch"),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=server_environment(self._device, marker, tensor_ranks(self._arguments)),
            )
        _write_record(self._record, self._process.pid, marker)
        api = ServerApi(f"http://127.0.0.1:{port}", self.api_key)
        api.open()
        try:
            await self._tell(port)
            await self._until_healthy(api, deadline_s)
        except BaseException:
            await api.close()
            await self.stop()
            raise
        return api

    @property
    def pid(self) -> int:
        """Of the server's first process, which leads the group of all of them."""
        assert self._process is not None
        return self._process.pid

    async def ended(self) -> EngineFailure:
        """Returns when the server's process has ended: what to tell those who waited for it."""
        assert self._process is not None
        code = await self._process.wait()
        return EngineFailure(f"the SGLang server ended with {_exit(code)}. {self._last_words()}")

    async def stop(self) -> None:
        """Ends the server and all that it started, at once: it has nothing to save, and SGLang takes seconds to end kindly."""
        if self._process is not None:
            await asyncio.to_thread(end_orphans, self._record)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._port is not None:
            self._port.close()

    async def _tell(self, port: int) -> None:
        """Hands over arguments and key by the pipe that stays open for as long as this process lives."""
        assert self._process is not None
        assert self._process.stdin is not None
        orders = {"arguments": {**self._arguments, "host": "127.0.0.1", "port": port}, "api_key": self.api_key, "parent": os.getpid()}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once: its log says why
            self._process.stdin.write(json.dumps(orders).encode() + b"\n")
            await self._process.stdin.drain()

    async def _until_healthy(self, api: ServerApi, deadline_s: float) -> None:
        assert self._process is not None
        limit = time.monotonic() + deadline_s
        while not await api.healthy():
            if self._process.returncode is not None:
                raise EngineFailure(f"the SGLang server did not start: {_exit(self._process.returncode)}. {self._last_words()}")
            if time.monotonic() > limit:
                raise EngineFailure(
                    f"the SGLang server was not up within {deadline_s:g} s. {self._last_words()}\n"
                    "The first start on a machine compiles kernels and takes minutes; a large model loads slowly from a network disk"
                )
            await asyncio.sleep(_POLL_S)

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        causes = [line for line in lines if _CAUSE.match(line)]
        cause = f"Its last error: {causes[-1]}\n" if causes else ""
        tail = "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
        return f"{cause}The end of {self._log}:\n{tail}"


def end_orphans(record: Path) -> None:
    """Ends what is left of the server that this record tells of, with the shared memory it leaves, and removes the record.

    Its processes are known by the marker in their environment, so a process that took over an old number is never touched.
    """
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):  # no server before, or one that died while it wrote
        return
    ours = [pid for pid in _processes() if _start_time(pid) >= known["start_time"] and _carries(pid, known["marker"])]
    left_behind = {path for pid in ours for path in _shared_memory(pid)}
    trackers = [pid for pid in ours if b"multiprocessing.resource_tracker" in _command(pid)]
    _kill(set(ours) - set(trackers))
    limit = time.monotonic() + _TRACKER_S  # they remove their dead clients' semaphores, and end
    while any(_start_time(pid) >= 0 for pid in trackers) and time.monotonic() < limit:
        time.sleep(0.02)
    _kill(trackers)
    for path in left_behind:
        path.unlink(missing_ok=True)
    record.unlink(missing_ok=True)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _carries(pid: int, marker: str) -> bool:
    try:
        return f"{MARKER}={marker}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or somebody else's
        return False


def _shared_memory(pid: int) -> set[Path]:
    """The files in shared memory that SGLang made in this process, and removes only if it ends kindly."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(line[line.index("/") :]) for line in maps.splitlines() if " /dev/shm/sgl" in line and "(deleted)" not in line}


def _start_time(pid: int) -> int:
    """In clock ticks after the machine's start; -1 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def _write_record(record: Path, pid: int, marker: str) -> None:
    partial = record.with_name(record.name + ".partial")
    partial.write_text(json.dumps({"pid": pid, "start_time": _start_time(pid), "marker": marker}))
    partial.rename(record)


def _reserved_port() -> socket.socket:
    """A port that stays ours: bound and never listened on, so that only a server that may share the address can take it."""
    port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))
    return port


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
