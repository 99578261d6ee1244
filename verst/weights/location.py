"""Where published weights lie, and who holds them. Imports no torch, so that the loop can look after the directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from verst.errors import ConfigError

_SHARED_MEMORY = Path("/dev/shm")
_SUFFIX = ".weights"
_PREFIX = "verst-"
LOCK = "owner.lock"
"""Held by the process that looks after the directory."""
_REMOVAL_S = 60.0


def publish_directory(run_id: str, location: str | None) -> Path:
    """Where a run's published weights go: a directory of its own below `weights.location`, or in shared memory."""
    return (shared_memory() if location is None else Path(location)) / f"{_PREFIX}{run_id}"


def version_file(directory: str | Path, version: int) -> Path:
    """The file of one version."""
    return Path(directory) / f"{version:08d}{_SUFFIX}"


def remove_versions(directory: str | Path, keep: Collection[int]) -> None:
    """Removes all published versions but these. Engines that still read a removed one can finish: its memory is freed after them."""
    kept = {version_file(directory, version) for version in keep}
    for path in Path(directory).glob(f"*{_SUFFIX}"):
        if path not in kept:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """The directory, new and empty; removed at the end of the block. Its lock tells every other run that its owner lives.

    First frees what dead runs of this user left in shared memory: nothing else does before the machine restarts. On a disk nothing but the
    own directory is touched, because a lock on a shared disk may not reach other hosts.

    Raises `ConfigError` if the place cannot be written.
    """
    remove_abandoned()
    try:
        owner = _claim(directory)
    except OSError as error:
        raise ConfigError(
            f"weights.location: cannot make {directory} ({error.strerror}): set weights.location to a directory that can be written"
        ) from error
    try:
        yield
    finally:
        remove_directory(directory)
        os.close(owner)


def remove_abandoned() -> None:
    """Removes published weights in shared memory whose owner, a run of this user, is dead."""
    for directory in shared_memory().glob(f"{_PREFIX}*"):
        try:
            if directory.stat().st_uid != os.getuid():
                continue
            owner = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # not one of ours, or gone meanwhile
            continue
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(owner), os.stat(directory / LOCK)):  # else its run was resumed a moment ago
                remove_directory(directory)
        except OSError:  # its owner lives, or another run removes it at this moment
            continue
        finally:
            os.close(owner)


def remove_directory(directory: str | Path) -> None:
    """Frees everything a run has published."""
    shutil.rmtree(directory, ignore_errors=True)


def shared_memory() -> Path:
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def _claim(directory: Path) -> int:
    """Makes the directory with its lock already taken, so that nobody ever sees it without. Returns the file that holds the lock."""
    limit = time.monotonic() + _REMOVAL_S
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        owner = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks; in shared memory there are always
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while not _replaced(staging, directory):
            if time.monotonic() > limit:
                raise OSError(errno.EBUSY, "what a former run left there cannot be removed")
            time.sleep(0.05)
    except OSError:
        remove_directory(staging)
        raise
    return owner


def _replaced(staging: Path, directory: Path) -> bool:
    """Frees the place and takes it; False if another run is just freeing it. In shared memory nothing is removed without its lock."""
    if directory.parent == shared_memory():
        remove_abandoned()
    else:
        remove_directory(directory)  # of this very run, which died
    try:
        staging.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
