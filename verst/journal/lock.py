"""One living process per run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
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
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _describe(text: bytes) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError):  # the holder has locked it but not yet written who it is
        return "another process"
