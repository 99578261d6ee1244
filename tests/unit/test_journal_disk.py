"""A journal on disks and clocks that misbehave: what is refused is said, and nothing is written over."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_spawn
from tests.unit.test_journal import FIRST, contents, fill
from verst.errors import JournalError, RunLocked
from verst.journal.audit import audit
from verst.journal.lock import RunLock
from verst.journal.log import Journal, JournalReader
from verst.journal.records import BatchRecord, FaultRecord
from verst.runtime.service import RunService

READ_ONLY = r"\(Read-only file system; \d+ bytes free on that disk\)\. Nothing was lost: make the disk writable for this user"


def read_only(*_: Any, **__: Any) -> Any:
    raise OSError(30, "Read-only file system")


def test_a_disk_that_turns_read_only_while_appending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 2)
    before = (tmp_path / FIRST).read_bytes()
    written = contents(journal)
    with monkeypatch.context() as patch:
        for call in ("pwritev", "ftruncate", "fsync"):
            patch.setattr(os, call, read_only)
        with pytest.raises(JournalError, match=rf"{FIRST}: could not write 42 bytes {READ_ONLY}"):
            journal.append_group(4, b"xy")
        with pytest.raises(JournalError, match=r"takes no more records: a partial record could not be removed \(Read-only file system\)"):
            journal.append_batch(BatchRecord(3, ()))
    with pytest.raises(JournalError, match="takes no more records"):
        journal.append_group(4, b"xy")  # also once the disk is writable again: what reached it is not known
    assert (tmp_path / FIRST).read_bytes() == before
    again = Journal.open(tmp_path, "r")
    assert contents(again) == written
    again.append_group(4, b"xy")
    again.close()
    assert JournalReader(tmp_path).group_payload(4) == b"xy"


def test_a_disk_that_is_read_only_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r", segment_bytes=300)
    fill(journal, 3)
    written = contents(journal)
    journal.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = os.open

    def for_reading(path: Any, flags: int, *args: Any, **options: Any) -> int:
        return read_only() if flags & (os.O_RDWR | os.O_WRONLY) else opened(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", for_reading)
        with pytest.raises(JournalError, match=rf"\.journal: could not open or change the journal {READ_ONLY}"):
            Journal.open(tmp_path)
        assert contents(JournalReader(tmp_path)) == written, "what only reads needs no more"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert contents(Journal.open(tmp_path)) == written


def test_a_new_segment_on_a_disk_that_turned_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r", segment_bytes=100)
    fill(journal, 1)
    opened = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags, *args: read_only() if str(path).endswith(".journal") else opened(path, flags, *args))
        with pytest.raises(JournalError, match=rf"0000000\d.journal: could not open or change the journal {READ_ONLY}"):
            fill(journal, 1, first=2)
    journal.append_batch(BatchRecord(2, (2, 3)))
    written = contents(journal)
    journal.close()
    assert contents(JournalReader(tmp_path, verify=True)) == written


def test_a_clock_that_jumps_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Times are for people: order is that of the frames."""
    journal = Journal.create(tmp_path, "r", segment_bytes=300)
    ticks = iter(range(1000, 0, -100))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    for step in range(1, 7):
        journal.append_fault(FaultRecord("replica 0", f"of step {step}", step - 1, time.time()))
        fill(journal, 1, first=step)
    journal.close()
    for path in tmp_path.iterdir():
        os.utime(path, (2e9 - int(path.name[:8]), 2e9 - int(path.name[:8])))  # the files' times go backwards too
    again = Journal.open(tmp_path)
    assert [(fault.reason, fault.time_s) for fault in again.faults()] == [(f"of step {s}", 1100.0 - 100 * s) for s in range(1, 7)]
    assert again.index.last_commit == 6
    assert again.remade == []
    assert [fault.step for fault in audit(tmp_path).faults] == list(range(6))


async def test_two_loops_on_one_run_are_one(done_run: LocalRun):
    """Who comes second is told who holds the run, and writes nothing."""
    directory = done_run.run.journal
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    second = RunService(str(done_run.run.root), local_spawn)
    with RunLock(done_run.run.root), pytest.raises(RunLocked, match=rf"is in use by process {os.getpid()} on .* wait for it, stop it"):
        await second.run()
    second._observer.close()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_journal_in_the_place_of_another_runs_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        journal = Journal.create(tmp_path / name, name, segment_bytes=300)
        fill(journal, 4)
        journal.close()
    stranger = (tmp_path / "two" / "00000002.journal").read_bytes()
    (tmp_path / "one" / "00000002.journal").write_bytes(stranger)  # as long as its own: the index file fits it by size
    with pytest.raises(JournalError, match=r"00000002.journal belongs to run 'two', not 'one'"):
        Journal.open(tmp_path / "one", "one")
    assert (tmp_path / "one" / "00000002.journal").read_bytes() == stranger
