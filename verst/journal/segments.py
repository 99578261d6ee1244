"""The files of a journal: segments `00000001.journal`, `00000002.journal`, …, how they begin, and how bytes get into them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from verst.errors import JournalError
from verst.journal.frames import Kind, pack_header

FORMAT = 2
SUFFIX = ".journal"


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}{SUFFIX}"


def index_path(directory: Path, number: int) -> Path:
    """Of the index file of a finished segment."""
    return directory / f"{number:08d}.index"


def segment_numbers(directory: Path) -> list[int]:
    """Those of a journal, ascending from 1. One whose payloads were given up has only its index file.

    Raises `JournalError` if there is no journal, or a segment between the others has neither file.
    """
    names = {path.name for path in directory.glob(f"*{SUFFIX}")}
    if not names:
        raise JournalError(f"{directory} holds no journal: put it back from a copy; without it the run cannot be continued")
    numbers = []
    while names:
        path = segment_path(directory, len(numbers) + 1)
        if path.name not in names and not index_path(directory, len(numbers) + 1).exists():
            raise missing(path, min(names))
        names.discard(path.name)
        numbers.append(len(numbers) + 1)
    return numbers


def missing(path: Path, other: str) -> JournalError:
    return JournalError(f"{path} is missing, though {other} is there: restore the file from a copy")


def create_segment(directory: Path, number: int, run_id: str, *, previous_bytes: int) -> None:
    """Makes a segment with its first record. It appears under its name only once both are durable."""
    path = segment_path(directory, number)
    partial = path.with_suffix(".partial")
    payload = json.dumps({"format": FORMAT, "run_id": run_id, "previous_bytes": previous_bytes}).encode()
    header = pack_header(Kind.SEGMENT, number, payload, durable_bytes=0)
    try:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(file, [header, payload], 0)
            os.fsync(file)
        finally:
            os.close(file)
        partial.rename(path)
        sync_directory(directory)
    except OSError as error:
        raise write_error(path, len(header) + len(payload), error) from error


def write_all(file: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    pending = [memoryview(part).cast("B") for part in parts]
    while pending:
        written = os.pwritev(file, pending, offset)
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if pending:
            pending[0] = pending[0][written:]


def write_error(path: Path, needed_bytes: int, error: OSError) -> JournalError:
    """What to tell of a disk that refused to take `needed_bytes` (0: it was not asked to)."""
    free_bytes = shutil.disk_usage(path.parent).free
    what = f"write {needed_bytes} bytes" if needed_bytes else "open or change the journal"
    todo = "free some space and try again, or resume the run later"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        todo = "make the disk writable for this user (one with errors becomes read-only: see the kernel's log), then resume the run"
    return JournalError(f"{path}: could not {what} ({error.strerror}; {free_bytes} bytes free on that disk). Nothing was lost: {todo}")


def sync_directory(directory: Path) -> None:
    with opened(directory) as file:
        os.fsync(file)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        yield file
    finally:
        os.close(file)
