"""One living process per run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from verst.errors import RunLocked

LOCK_NAME = "run.lock"


class RunLock:
    """Holds a run directory until `release`, the end of a `with` block, or the end of the process, however it ends.

    The lock is the kernel's (flock), so a killed process leaves none behind; the file's text only serves the message.
    """

    def __init__(self, directory: str | Path) -> None:
        """Takes the lock; makes the directory if need be. Raises `RunLocked` at once if another process holds it."""
        self._path = Path(directory) / LOCK_NAME
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(self._file)
        except BlockingIOError:
            holder = _describe(os.pread(self._file, 4096, 0))
            self.release()
            raise RunLocked(f"{self._path.parent} is in use by {holder}: wait for it, stop it, or give this run another run.name") from None
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
        with suppress(OSError):  # on a full disk the lock still holds
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(about).encode(), 0)

    def release(self) -> None:
        """Frees the directory. The file stays: removing it would let two processes lock two files of one name."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def holder_of(directory: str | Path) -> str | None:
    """Who holds the directory, in words; None if nobody does. Holds it for an instant, in common with others who ask."""
    try:
        file = os.open(Path(directory) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(os.pread(file, 4096, 0))
    else:
        return None
    finally:
        os.close(file)


def _lock(file: int) -> None:
    """Raises `BlockingIOError` if it stays held: for an instant it may be held by those who only ask who holds it."""
    for pause_s in (0.01, 0.05, 0.2):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(pause_s)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _describe(text: bytes) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError):  # the holder has locked it but not yet written who it is
        return "another process"
