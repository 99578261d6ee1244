"""Index files beside finished segments: used when they fit, made anew when they do not, and all that is left of what was given up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.loop.fakes import group
from tests.unit.test_journal import append_extra, contents, fill
from verst.errors import InvariantViolation, JournalError
from verst.journal import reader
from verst.journal.codec import encode_group
from verst.journal.frames import Kind, pack_header
from verst.journal.index import Index
from verst.journal.log import Journal, JournalReader
from verst.journal.places import Column, Location, Places
from verst.journal.query import Query, select
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord
from verst.journal.segments import create_segment, index_path, segment_path, write_all
from verst.journal.sidecar import index_of, read_index


def made(directory: Path, steps: int = 8) -> list[object]:
    """A journal of several segments; its contents."""
    journal = Journal.create(directory, "r", segment_bytes=600)
    fill(journal, 2)
    append_extra(journal)
    fill(journal, steps - 2, first=3)
    written = contents(journal)
    journal.close()
    assert len(list(directory.glob("*.journal"))) > 4
    return written


def everything(journal: JournalReader) -> list[object]:
    return [
        *contents(journal),
        list(journal.index.admitted),
        [journal.publish(version) for version in journal.index.published],
        journal.changes(),
        journal.faults(),
        journal.recoveries(),
        journal.recovery(0),
    ]


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Segments that were read frame by frame."""
    found: list[str] = []
    scan = reader.scan

    def recorded(file: int, start: int, size: int):
        found.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        return scan(file, start, size)

    monkeypatch.setattr(reader, "scan", recorded)
    return found


def test_only_the_last_segment_is_read(tmp_path: Path, scanned: list[str]):
    written = made(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.journal"))
    assert [path.name for path in sorted(tmp_path.glob("*.index"))] == [f"{name[:8]}.index" for name in names[:-1]]
    scanned.clear()
    quick = JournalReader(tmp_path, "r")
    assert scanned == names[-1:]
    thorough = JournalReader(tmp_path, "r", verify=True)
    assert scanned[1:] == names
    assert contents(quick) == written
    assert everything(quick) == everything(thorough)
    assert quick.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert quick.remade == []


@pytest.mark.parametrize("writer", [False, True])
def test_a_missing_index_is_made_anew_by_the_writer_only(tmp_path: Path, scanned: list[str], writer: bool):
    written = made(tmp_path)
    before = index_path(tmp_path, 2).read_bytes()
    index_path(tmp_path, 2).unlink()
    scanned.clear()
    found = Journal.open(tmp_path) if writer else JournalReader(tmp_path)
    assert scanned[0] == "00000002.journal"
    assert contents(found) == written
    assert found.remade == []
    assert index_path(tmp_path, 2).exists() == writer
    if writer:
        assert index_path(tmp_path, 2).read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content[:-1], "no whole index"),
        (lambda content: b"", "no whole index"),
        (lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:], "corrupt index"),
        (lambda content: bytes([content[0] ^ 1]) + content[1:], "no whole index"),
    ],
)
def test_a_damaged_index_is_told_and_made_anew(tmp_path: Path, spoil, reason: str):
    written = made(tmp_path)
    path = index_path(tmp_path, 2)
    before = path.read_bytes()
    path.write_bytes(spoil(before))
    assert contents(JournalReader(tmp_path)) == written
    again = Journal.open(tmp_path)
    assert contents(again) == written
    (told,) = again.remade
    assert told.startswith(f"{path} is not used: {reason}")
    assert path.read_bytes() == before


def test_an_index_of_other_bytes_is_not_trusted(tmp_path: Path):
    written = made(tmp_path)
    index_path(tmp_path, 2).write_bytes(index_path(tmp_path, 3).read_bytes())
    journal = JournalReader(tmp_path)
    assert contents(journal) == written
    assert "the index of segment 3" in journal.remade[0]
    # whole frames are gone from the segment: its size is not the one that the index tells
    first = segment_path(tmp_path, 3)
    content = first.read_bytes()
    first.write_bytes(content[: 40 + int.from_bytes(content[24:32], "little")])
    with pytest.raises(JournalError, match=r"00000003.journal ends at byte \d+, but \d+ bytes had been written"):
        JournalReader(tmp_path)


def test_an_index_whose_records_do_not_follow_is_not_trusted(tmp_path: Path):
    """It fits its segment by size and checksum, and yet says what cannot be."""
    written = made(tmp_path)
    true = index_of(tmp_path, 2)
    replace(true, keys_F=np.where(true.kinds_F == Kind.GROUP, 0, true.keys_F)).write(tmp_path)  # group 0 lies in segment 1
    journal = JournalReader(tmp_path)
    assert contents(journal) == written
    assert "00000002.index is not used: its records do not follow from those before them" in journal.remade[0]
    assert len(journal.remade) == 1


def test_damage_behind_an_index_is_found_when_it_is_looked_for(tmp_path: Path):
    made(tmp_path)
    path = segment_path(tmp_path, 2)
    where = JournalReader(tmp_path).index.batches[2]
    content = bytearray(path.read_bytes())
    content[where.offset + 45] ^= 1
    path.write_bytes(content)
    quick = JournalReader(tmp_path)
    with pytest.raises(JournalError, match=r"00000002.journal: batch of step 2 has corrupt payload"):
        quick.batch(2)
    with pytest.raises(JournalError, match=r"00000002.journal: corrupt payload at byte \d+"):
        JournalReader(tmp_path, verify=True)


def test_an_index_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.journal.sidecar.write_all", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    written = made(tmp_path)
    assert list(tmp_path.glob("*.index")) == []
    monkeypatch.undo()
    assert contents(Journal.open(tmp_path)) == written
    assert list(tmp_path.glob("*.index"))


# ---- retention


def test_what_no_checkpoint_needs_is_given_up_from_the_oldest_on(tmp_path: Path):
    made(tmp_path)
    journal = Journal.open(tmp_path, segment_bytes=600)
    before = everything(JournalReader(tmp_path))[1:]
    size = journal.size_bytes
    assert journal.give_up(8, size) == []
    assert journal.give_up(0, 1) == []  # no checkpoint: every batch may have to be trained again
    assert journal.give_up(4, size - 1) == [1]
    assert not segment_path(tmp_path, 1).exists()
    released = journal.give_up(4, 1)
    for found in (journal, JournalReader(tmp_path), Journal.open(tmp_path)):
        assert found.given_up == {1, *released}
        assert found.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) < size
        kept = [seq for seq in found.index.groups if found.keeps(seq)]
        assert set(kept) >= set(range(8, 16)), "groups of steps after the checkpoint"
        assert set(kept).isdisjoint({0, 1, 2, 3})
        assert len(kept) == len(found.index.groups) - found.index.groups.count_in(found.given_up)
        with pytest.raises(JournalError, match=r"group 0 was given up by retention .*limit_bytes\): .*00000001.index only"):
            found.group_payload(0)
        assert all(found.group_payload(seq) for seq in kept)
        assert [[found.batch(s) for s in found.index.batches], [found.commit(s) for s in found.index.commits]] == before[:2]
        assert found.recovery(4).retrain == tuple((step, f"digest-{step}") for step in range(5, 9))
    journal.append_group(16, b"goes on")
    journal.close()
    assert JournalReader(tmp_path).group_payload(16) == b"goes on"


def test_a_segment_with_a_group_that_no_step_took_is_kept(tmp_path: Path):
    journal = Journal.create(tmp_path, "r", segment_bytes=400)
    journal.append_group(100, b"left" * 20)
    fill(journal, 6)
    assert 1 not in journal.give_up(6, 1)
    assert journal.group_payload(100) == b"left" * 20
    journal.append_batch(BatchRecord(7, (100,)))
    journal.append_commit(CommitRecord(7, "d"))
    assert 1 not in journal.give_up(6, 1), "its step is after the checkpoint"
    assert journal.give_up(7, 1) == [1]


def test_a_crash_between_index_and_removal_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = made(tmp_path)
    journal = Journal.open(tmp_path)

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(JournalError, match=r"00000001.journal: could not open or change the journal \(Read-only file system"):
            journal.give_up(8, 1)
    again = Journal.open(tmp_path)
    assert contents(again) == written
    assert again.given_up == set()
    assert again.give_up(8, again.size_bytes - 1) == [1]
    assert not segment_path(tmp_path, 1).exists()


def test_a_segment_that_is_gone_without_having_been_given_up_is_missing(tmp_path: Path):
    made(tmp_path)
    segment_path(tmp_path, 2).unlink()
    with pytest.raises(JournalError, match=r"00000002.journal is missing, though 00000002.index is there: restore the file"):
        JournalReader(tmp_path)


def test_a_damaged_index_of_what_was_given_up_is_named(tmp_path: Path):
    made(tmp_path)
    Journal.open(tmp_path).give_up(8, 1)
    path = index_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JournalError, match=r"00000001.index: no whole index.*its segment was given up: restore the file from a copy"):
        JournalReader(tmp_path)


def test_an_index_of_what_was_given_up_whose_records_do_not_follow_is_named(tmp_path: Path):
    made(tmp_path)
    Journal.open(tmp_path).give_up(8, 1)
    true = read_index(tmp_path, 2)
    replace(true, keys_F=np.where(true.kinds_F == Kind.GROUP, 0, true.keys_F)).write(tmp_path)
    with pytest.raises(JournalError, match=r"00000002.index: its records do not follow .* and its segment was given up"):
        JournalReader(tmp_path)


def test_a_query_leaves_out_what_was_given_up(tmp_path: Path):
    journal = Journal.create(tmp_path, "r", segment_bytes=3000)
    for step in range(1, 5):
        journal.append_group(step - 1, encode_group(group(step - 1, 0)))
        journal.append_batch(BatchRecord(step, (step - 1,)))
        journal.append_commit(CommitRecord(step, "d"))
    assert 1 in journal.give_up(4, 1)
    gone = [seq for seq in range(4) if not journal.keeps(seq)]
    assert [found.group.seq for found in select(journal, Query())] == [seq for seq in range(4) for _ in range(2) if seq not in gone]
    with pytest.raises(JournalError, match="group 0 was given up"):
        list(select(journal, Query(group=0)))


# ---- the index in memory


def test_columns_grow_and_forget_nothing():
    column = Column("int32")
    for key in (0, 5_000, 3, 100_000):
        column.set(key, key + 1)
    assert [column.get(key) for key in (0, 1, 3, 5_000, 100_000, 10**9, -1)] == [1, 0, 4, 5_001, 100_001, 0, 0]
    assert column.end == 100_001
    places = Places()
    places.add(7, Location(3, 12345678901))
    places.add(9, Location(3, 1))
    assert (places.since(7), places.since(8), places.since(10), places.count_in({3}), places.count_in({2})) == ([7, 9], [9], [], 2, 0)
    assert places[7] == Location(3, 12345678901)
    assert (list(places), len(places), 6 in places, "7" in places) == ([7, 9], 2, False, False)
    with pytest.raises(KeyError):
        places[6]


def test_a_number_that_no_group_was_given_is_refused():
    """It would take memory for every number below it."""
    with pytest.raises(InvariantViolation, match="group seq 1099511627776 is far beyond the 0 before it"):
        Index().check_group(1 << 40)


def test_a_record_that_is_none_is_named(tmp_path: Path):
    create_segment(tmp_path, 1, "r", previous_bytes=0)
    offset = segment_path(tmp_path, 1).stat().st_size
    with segment_path(tmp_path, 1).open("r+b") as file:
        payload = b'{"seq": 1}'
        write_all(file.fileno(), [pack_header(Kind.ADMIT, 1, payload, durable_bytes=0), payload], offset)
    with pytest.raises(JournalError, match=rf"byte {offset}: a record ADMIT cannot be read .* written by another program"):
        JournalReader(tmp_path)
    payload = AdmitRecord(2, "p", 0).to_json()
    with segment_path(tmp_path, 1).open("r+b") as file:
        write_all(file.fileno(), [pack_header(Kind.ADMIT, 1, payload, durable_bytes=0), payload], offset)
    with pytest.raises(JournalError, match="a record ADMIT of 2 has the key 1"):
        JournalReader(tmp_path)


def test_the_index_of_a_segment_is_the_same_from_writer_and_scan(tmp_path: Path):
    made(tmp_path)
    for number in range(1, 4):
        assert read_index(tmp_path, number).same_frames(index_of(tmp_path, number))
        assert read_index(tmp_path, number).segment_bytes == segment_path(tmp_path, number).stat().st_size
