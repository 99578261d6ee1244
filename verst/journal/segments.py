"""The files of a journal: segments `00000001.journal`, `00000002.journal`, …, how they begin, and how bytes get into them."""

from __future__ import annotations

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


def segment_numbers(directory: Path) -> list[int]:
    names = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
    if not names:
        raise JournalError(f"{directory} holds no journal: put it back from a copy; without it the run cannot be continued")
    for number, name in enumerate(names, start=1):
        if name != segment_path(directory, number).name:
            raise JournalError(f"{segment_path(directory, number)} is missing, though {name} is there: restore the file from a copy")
    return list(range(1, len(names) + 1))


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
    free_bytes = shutil.disk_usage(path.parent).free
    return JournalError(
        f"{path}: could not write {needed_bytes} bytes ({error.strerror}; {free_bytes} bytes free on that disk). "
        "Nothing was lost: free some space and try again, or resume the run later"
    )


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
