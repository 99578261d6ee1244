"""Runs Python code that nobody has read: shut in, with limits, and gone at its end.

The code has namespaces of its own for processes, mounts, IPC and the network, which is empty; a file system that it cannot write, but for
a small `/tmp` and `/dev/shm`, and without homes, sockets, this process's working directory and what it hides (`hide`); no variables of
this process's environment; and, where this process is root, a user id that nobody has (`verst.rollout.sandbox_child`). It is meant for
what a model writes by accident or to please its reward, and is no wall against somebody who knows a hole in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

from verst.errors import EnvironmentFailure

_CHILD = Path(__file__).with_name("sandbox_child.py")
_WRITABLE = ("/tmp", "/dev/shm")
_HIDDEN = ("/run", "/var/tmp", "/home", "/root")
_DRAINED_BYTES = 2**20
"""Output past which the code is ended: to read on would only cost this process's time."""
_PROBE_S = 30.0
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one piece of code may use. Memory and processor time are each process's.

    `processes` counts threads too and, unless this process is root, two of the sandbox itself. Kernels before Linux 5.14 count all that the
    user runs on the machine.
    """

    timeout_s: float = 10.0  # by the clock; also of processor time
    memory_mb: int = 1024  # address space
    disk_mb: int = 64  # of a file, and of all that is written
    processes: int = 32
    output_bytes: int = 4096  # what is kept of the output

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
                raise ValueError(f"{name} is {value!r}; it must be a number above 0")

    def resources(self) -> Mapping[str, int]:
        """By the names of `setrlimit`."""
        return {
            "CPU": math.ceil(self.timeout_s) + 1,  # the clock, which has better words, comes first where there is one process
            "AS": int(self.memory_mb) * 2**20,
            "FSIZE": int(self.disk_mb) * 2**20,
            "NPROC": int(self.processes),
            "NOFILE": 256,
            "CORE": 0,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a piece of code ended: with an exit code, by a signal, or by one of the two limits that end it from outside."""

    output: str  # standard output and error as they came, the first `Limits.output_bytes`
    cut: bool  # whether there was more
    exit_code: int | None = None
    signal: str | None = None
    timed_out: bool = False
    flooded: bool = False

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


class Sandbox:
    """Runs one piece of code after the other, each in a process of its own that starts from nothing.

    Args:
        limits: of each piece.
        isolated: False runs it without namespaces: with this process's files and network, and what it starts can outlive it.
    """

    def __init__(self, limits: Limits | None = None, *, isolated: bool = True) -> None:
        self._limits = limits or Limits()
        self._isolated = isolated
        self._endings: set[asyncio.Future[None]] = set()

    async def run(self, code: str) -> Outcome:
        """Raises `EnvironmentFailure` if the sandbox itself could not be made. Whatever the code does is an `Outcome`.

        A cancelled call ends the code. So many run at a time as this process has processors.
        """
        async with _places():
            directory = None if self._isolated else tempfile.mkdtemp(prefix="verst-tool-")
            process, output, status = _launch(code, self._limits, directory)
            try:
                return await self._outcome(output, status)
            finally:
                output.close()
                status.close()
                ending = asyncio.ensure_future(asyncio.to_thread(_end, process, directory))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)
                await asyncio.shield(ending)

    async def close(self) -> None:
        """Returns once nothing runs any more of what was cancelled."""
        if self._endings:
            await asyncio.wait(self._endings)

    async def _outcome(self, printed: IO[bytes], told: IO[bytes]) -> Outcome:
        kept, total, timed_out = bytearray(), 0, False
        async with _reader(told) as status, _reader(printed) as output:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    while total <= _DRAINED_BYTES and (data := await output.read(2**16)):
                        kept += data[: max(0, self._limits.output_bytes - total)]
                        total += len(data)
            except TimeoutError:
                timed_out = True
            text, cut = kept.decode("utf-8", "replace"), total > len(kept)
            if timed_out or total > _DRAINED_BYTES:
                return Outcome(text, cut, timed_out=timed_out, flooded=not timed_out)
            try:
                async with asyncio.timeout(_END_S):  # what comes right after the end of the output
                    said = _told(await status.readline())
            except TimeoutError:
                said = {}
        if "failed" in said:
            raise EnvironmentFailure(f"the sandbox could not be made: {said['failed']}")
        return Outcome(text, cut, said.get("exit"), said.get("signal"))


_ANSWERS: set[str] = set()


def hide(paths: Iterable[str]) -> None:
    """Files and directories that code in a sandbox of this process finds empty from now on, wherever they lie."""
    _ANSWERS.update(paths)


@lru_cache(maxsize=1)
def refusal() -> str | None:
    """Why code cannot be isolated on this machine; None if it can. Tried once in each process, by running something.

    Blocks for a tenth of a second, on a busy machine for seconds.
    """
    if sys.platform != "linux":
        return f"namespaces are Linux's, and this is {sys.platform}"
    process, printed, told = _launch("print(6 * 7)", Limits(), None)
    with printed, told:
        try:
            process.wait(_PROBE_S)
        except subprocess.TimeoutExpired:
            return f"one that was tried did not end within {_PROBE_S:g} s"
        finally:
            _end(process, None)
        words, said = printed.read(), _told(told.readline())
    if "failed" in said:
        return said["failed"]
    return None if words == b"42\n" and said == {"exit": 0} else f"one that was tried printed {words[-300:]!r} and ended with {said}"


def _launch(code: str, limits: Limits, directory: str | None) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    """Starts the code and returns its process, its output, and what is told of its end. `directory`: where it runs if not isolated."""
    settings = {
        "parent": os.getpid(),
        "isolated": directory is None,
        "directory": directory or _WRITABLE[0],
        "limits": limits.resources(),
        "disk_bytes": int(limits.disk_mb) * 2**20,
        "python": _python(),
        "environment": _environment(directory or _WRITABLE[0]),
        "writable": _WRITABLE,
        "kept": _kept(),
        "hidden": _hidden(),
    }
    output, theirs = os.pipe()
    status, telling = os.pipe()
    with open(output, "rb", 0) as printed, open(status, "rb", 0) as told, open(theirs, "wb", 0), open(telling, "wb", 0):
        with tempfile.TemporaryFile() as source:  # a pipe would have to be written while the sandbox reads it
            source.write(code.encode("utf-8", "surrogatepass"))
            source.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), json.dumps(settings), str(telling)],
                stdin=source,
                stdout=theirs,
                stderr=theirs,
                pass_fds=(telling,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        return process, open(os.dup(printed.fileno()), "rb", 0), open(os.dup(told.fileno()), "rb", 0)


def _end(process: subprocess.Popen[bytes], directory: str | None) -> None:
    """Ends the process with all that is in its sandbox, and waits for that. It is not reaped before, so its number is its own."""
    if directory is None and process.returncode is None:
        process.terminate()  # it ends process 1 and waits for it, which leaves nothing to whoever inherits orphans
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)  # milliseconds, unless a driver holds it
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def _environment(home: str) -> Mapping[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", **threads}


def _python() -> str:
    """By a directory that is no link: the place of one may be covered. The program itself may be one, by which it finds its packages."""
    directory, name = os.path.split(sys.executable)
    return os.path.join(os.path.realpath(directory), name)


def _kept() -> list[str]:
    """Where Python and its packages lie."""
    return sorted({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))})


def _hidden() -> list[str]:
    """What the code finds empty: homes, sockets, and, for the sake of the answers, where the run was started and what `hide` was told."""
    needed = ("/usr/lib", "/lib", "/etc", "/dev", *_kept(), *_WRITABLE)
    paths = [os.path.realpath(path) for path in (*_HIDDEN, os.path.expanduser("~"), os.getcwd(), *sorted(_ANSWERS))]
    return [path for path in dict.fromkeys(paths) if path != "/" and path not in needed and not "/usr/lib".startswith(f"{path}/")]


def _told(line: bytes) -> dict[str, Any]:
    """Nothing, if the sandbox was ended before it could say how the code did."""
    return json.loads(line or b"{}")


@contextlib.asynccontextmanager
async def _reader(file: IO[bytes]) -> AsyncIterator[asyncio.StreamReader]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    try:
        yield reader
    finally:
        transport.close()


_PLACES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


def _places() -> asyncio.Semaphore:
    """More at a time than there are processors would only run into their limits."""
    loop = asyncio.get_running_loop()
    return _PLACES.setdefault(loop, asyncio.Semaphore(os.cpu_count() or 1))
