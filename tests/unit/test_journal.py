import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.errors import InvariantViolation, JournalError, RunLocked
from verst.journal import segments
from verst.journal.codec import encode_group
from verst.journal.index import Recovery
from verst.journal.lock import RunLock
from verst.journal.log import Journal, JournalReader
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, RecoveryRecord
from verst.types import Group, Message, Prompt, Status, Trajectory

FIRST = "00000001.journal"


def contents(journal: JournalReader) -> list[object]:
    """Everything a journal holds, read back from disk."""
    index = journal.index
    groups = [(seq, journal.group_payload(seq)) for seq in index.groups]
    return [groups, [journal.batch(step) for step in index.batches], [journal.commit(step) for step in index.commits]]


def fill(journal: Journal, steps: int, *, first: int = 1, per_step: int = 2, payload_bytes: int = 50) -> None:
    """Steps of two groups, a batch and a commit."""
    for step in range(first, first + steps):
        seqs = tuple(range((step - 1) * per_step, step * per_step))
        for seq in seqs:
            journal.append_group(seq, bytes([seq % 256]) * payload_bytes)
        journal.append_batch(BatchRecord(step, seqs, plan={"seed": step}))
        journal.append_commit(CommitRecord(step, f"digest-{step}", info={"loss": 0.5}))


def test_what_was_appended_is_read_back(tmp_path: Path):
    journal = Journal.create(tmp_path, "run-a")
    fill(journal, 3)
    journal.append_group(6, b"six")
    written = contents(journal)
    journal.close()

    again = Journal.open(tmp_path, "run-a")
    assert contents(again) == written
    assert again.torn is None
    assert again.batch(2) == BatchRecord(2, (2, 3), plan={"seed": 2})
    assert again.commit(3) == CommitRecord(3, "digest-3", {"loss": 0.5})
    assert again.group_payload(6) == b"six"
    again.append_group(7, b"seven")
    assert JournalReader(tmp_path).group_payload(7) == b"seven"


def append_extra(journal: Journal) -> None:
    journal.append_admitted(AdmitRecord(6, "prompt-6", 2))
    journal.append_admitted(AdmitRecord(6, "prompt-6", 2))  # again, after a crash
    journal.append_published(PublishRecord(0, "initial", (0, 1)))
    journal.append_published(PublishRecord(2, "digest-2", (0,)))
    journal.append_configured(ConfigRecord(2, {"rollout.replicas": [1, 2]}))
    journal.append_fault(FaultRecord("replica 1", "exit code 137", 2, 12.5))
    journal.append_recovery(RecoveryRecord("replica 1", 2, "replacement", 0.5, 13.0))


def test_what_happened_beside_the_steps_is_read_back(tmp_path: Path):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 2)
    append_extra(journal)
    journal.close()
    for again in (JournalReader(tmp_path), journal):
        assert again.admission(6) == AdmitRecord(6, "prompt-6", 2)
        assert again.publish(2) == PublishRecord(2, "digest-2", (0,))
        assert again.changes() == [ConfigRecord(2, {"rollout.replicas": [1, 2]})]
        assert again.faults() == [FaultRecord("replica 1", "exit code 137", 2, 12.5)]
        assert again.recoveries() == [RecoveryRecord("replica 1", 2, "replacement", 0.5, 13.0)]
        assert again.recovery(2) == Recovery(retrain=(), pending=(), missing=(4, 5, 6), next_seq=7)  # admitted, not finished


@pytest.mark.parametrize(
    ("append", "message"),
    [
        (lambda j: j.append_admitted(AdmitRecord(1, "p", 0)), "group 1 is in the journal already"),
        (lambda j: j.append_admitted(AdmitRecord(-1, "p", 0)), "group seq -1 is negative"),
        (lambda j: j.append_published(PublishRecord(3, "d", (0,))), "version 3 cannot be served: the last commit is of step 2"),
        (lambda j: j.append_published(PublishRecord(-1, "d", (0,))), "version -1 cannot be served"),
    ],
)
def test_what_cannot_have_happened_is_refused(tmp_path: Path, append: Callable[[Journal], None], message: str):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 2)
    before = (tmp_path / FIRST).read_bytes()
    with pytest.raises(InvariantViolation, match=message):
        append(journal)
    assert (tmp_path / FIRST).read_bytes() == before


def test_a_group_survives_as_it_was(tmp_path: Path):
    tokens_T = np.arange(4, dtype=np.int32)
    row = Trajectory("0/0", tokens_T, tokens_T > 1, np.zeros(4, np.float32), tokens_T, (), (Message("user", "€"),), Status.FINISHED, 1)
    group = Group(0, Prompt("p", (Message("user", "€"),)), (row,), 0)
    journal = Journal.create(tmp_path, "r")
    journal.append_group(0, encode_group(group))
    found = journal.group(0)
    assert found.trajectories[0].messages == (Message("user", "€"),)
    assert found.trajectories[0].tokens_T.tolist() == [0, 1, 2, 3]


def test_segments_roll_and_keep_every_record(tmp_path: Path):
    journal = Journal.create(tmp_path, "r", segment_bytes=600)
    fill(journal, 8)
    assert len(list(tmp_path.glob("*.journal"))) > 4
    written = contents(journal)
    journal.close()
    assert contents(JournalReader(tmp_path, "r")) == written


def test_recovery_retrains_what_was_batched_and_keeps_what_was_not(tmp_path: Path):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 2)  # steps 1 and 2 of groups 0 to 3
    for seq in (4, 5, 6, 8, 9):  # 7 was in flight
        journal.append_group(seq, b"x")
    journal.append_batch(BatchRecord(3, (4, 6), dropped={5: "failed"}))
    expected = Recovery(retrain=((2, "digest-2"), (3, None)), pending=(8, 9), missing=(7,), next_seq=10)
    assert journal.recovery(1) == expected
    assert JournalReader(tmp_path).recovery(1) == expected
    assert journal.recovery(0).retrain == ((1, "digest-1"), (2, "digest-2"), (3, None))
    assert journal.recovery(2).retrain == ((3, None),)


def test_a_state_newer_than_the_journal_is_refused(tmp_path: Path):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 1)
    with pytest.raises(JournalError, match="restored state is of step 2, but the journal's last commit is of step 1"):
        journal.recovery(2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (BatchRecord(3, (2,)), "batch of step 3 cannot follow that of step 1"),
        (BatchRecord(1, (2,)), "batch of step 1 cannot follow"),
        (BatchRecord(2, (2, 1)), "names group 1, which step 1 has taken"),
        (BatchRecord(2, (2,), dropped={2: "failed"}), "names a group twice"),
        (BatchRecord(2, (2, 9)), "names group 9, which is not in the journal"),
        (CommitRecord(2, "d"), "commit of step 2 has no batch"),
        (CommitRecord(1, "d"), "commit of step 1 cannot follow that of step 1"),
    ],
)
def test_records_that_would_train_twice_or_skip_are_refused(tmp_path: Path, record: BatchRecord | CommitRecord, message: str):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 1)
    journal.append_group(2, b"x")
    before = (tmp_path / FIRST).read_bytes()
    with pytest.raises(InvariantViolation, match=message):
        journal.append_batch(record) if isinstance(record, BatchRecord) else journal.append_commit(record)
    with pytest.raises(InvariantViolation, match="group 2 is in the journal already"):
        journal.append_group(2, b"y")
    assert (tmp_path / FIRST).read_bytes() == before


def test_another_run_format_or_place_is_refused(tmp_path: Path):
    with pytest.raises(JournalError, match="holds no journal"):
        Journal.open(tmp_path)
    Journal.create(tmp_path, "mine").close()
    with pytest.raises(JournalError, match="belongs to run 'mine', not 'yours'"):
        Journal.open(tmp_path, "yours")
    with pytest.raises(JournalError, match="holds a journal already"):
        Journal.create(tmp_path, "mine")


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(segments, "FORMAT", 1)
        segments.create_segment(tmp_path, 1, "r", previous_bytes=0)
    with pytest.raises(JournalError, match="has journal format 1, this version of Verst reads 2"):
        Journal.open(tmp_path)


def rolled(directory: Path) -> list[Path]:
    journal = Journal.create(directory, "r", segment_bytes=500)
    fill(journal, 6)
    journal.close()
    return sorted(directory.glob("*.journal"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_segment_is_named(tmp_path: Path, lost: int):
    paths = rolled(tmp_path)
    paths[lost].unlink()
    with pytest.raises(JournalError, match=rf"{paths[lost].name} is missing"):
        Journal.open(tmp_path)


def test_a_shortened_or_swapped_closed_segment_is_named(tmp_path: Path):
    paths = rolled(tmp_path)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1])
    with pytest.raises(JournalError, match=rf"{paths[1].name}: incomplete frame at byte \d+, though segment 3 follows"):
        Journal.open(tmp_path)
    first_frame = 40 + int.from_bytes(content[24:32], "little")
    paths[1].write_bytes(content[:first_frame])  # whole frames are gone
    with pytest.raises(JournalError, match=f"{paths[1].name} ends at byte {first_frame}"):
        Journal.open(tmp_path)
    paths[1].write_bytes(b"")
    with pytest.raises(JournalError, match=f"{paths[1].name} is empty"):
        Journal.open(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(JournalError, match="was written as segment 3"):
        Journal.open(tmp_path)


def test_an_empty_first_segment_is_named(tmp_path: Path):
    (tmp_path / FIRST).write_bytes(b"")
    with pytest.raises(JournalError, match=f"{FIRST} is empty"):
        Journal.open(tmp_path, "r")


def test_a_tail_cut_at_any_byte_is_dropped_and_told(tmp_path: Path):
    """The last frames are a commit, two groups without a batch, and nothing else; each cut keeps exactly the whole ones."""
    source = tmp_path / "source"
    journal = Journal.create(source, "r")
    fill(journal, 1)
    ends = [(source / FIRST).stat().st_size]
    fill_from = ends[0]
    for seq in (2, 3):
        journal.append_group(seq, b"payload" * 3)
        ends.append((source / FIRST).stat().st_size)
    content = (source / FIRST).read_bytes()
    target = tmp_path / "cut"
    target.mkdir()
    for cut in range(fill_from, len(content)):
        (target / FIRST).write_bytes(content[:cut])
        reader = JournalReader(target)
        assert (target / FIRST).stat().st_size == cut  # readers change nothing
        reopened = Journal.open(target, "r")
        whole = max(end for end in ends if end <= cut)
        kept = ends.index(whole)
        assert list(reopened.index.groups) == list(reader.index.groups) == [0, 1, 2, 3][: 2 + kept]
        if cut == whole:
            assert reopened.torn is None
        else:
            assert reopened.torn is not None
            assert (reopened.torn.offset, reopened.torn.bytes_cut) == (whole, cut - whole)
            assert f"{cut - whole} bytes at byte {whole} are left out" in str(reopened.torn)
        assert (target / FIRST).stat().st_size == cut  # it is cut off by what follows: until then it may turn out to be damage
        reopened.append_group(9, b"nine")
        reopened.close()
        assert JournalReader(target).group_payload(9) == b"nine"


def test_a_torn_tail_of_a_full_segment_is_cut_before_the_next_one_begins(tmp_path: Path):
    journal = Journal.create(tmp_path, "r")
    journal.append_group(0, b"zero")
    journal.close()
    with (tmp_path / FIRST).open("ab") as file:
        file.write(b"VsJ1 half a header")
    again = Journal.open(tmp_path, segment_bytes=100)
    again.append_batch(BatchRecord(1, (0,)))
    again.close()
    assert len(list(tmp_path.glob("*.journal"))) == 2
    assert JournalReader(tmp_path).batch(1).groups == (0,)


@pytest.fixture(scope="module")
def sample_journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int, int]:
    """A directory to damage, an intact segment, the byte where its last commit starts, and where its unsynced groups start."""
    directory = tmp_path_factory.mktemp("sample")
    journal = Journal.create(directory, "r")
    fill(journal, 2)
    commit_offset = journal.index.commits[2].offset
    for seq in (4, 5):
        journal.append_group(seq, b"z" * 30)
    groups_offset = journal.index.groups[4].offset
    journal.close()
    return directory, (directory / FIRST).read_bytes(), commit_offset, groups_offset


@given(position=st.integers(0, 10_000), damage=st.binary(min_size=1, max_size=60) | st.integers(1, 60).map(bytes))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_never_read_as_truth(sample_journal: tuple[Path, bytes, int, int], position: int, damage: bytes) -> None:
    """Any overwritten span is an error if it touches what had been fsynced, and else costs only frames from there on."""
    directory, content, _, groups_offset = sample_journal
    position %= len(content)
    damaged = (content[:position] + damage + content[position + len(damage) :])[: len(content)]
    first = next((i for i, (old, new) in enumerate(zip(content, damaged, strict=True)) if old != new), None)
    (directory / FIRST).write_bytes(damaged)
    if first is None:
        assert JournalReader(directory).torn is None
    elif first < groups_offset:
        with pytest.raises(JournalError, match=rf"{FIRST}.* at byte \d+"):
            Journal.open(directory, "r")
        assert (directory / FIRST).read_bytes() == damaged  # nothing is changed on disk
    else:
        journal = Journal.open(directory, "r")
        assert journal.torn is not None
        assert journal.torn.offset <= first
        assert set(journal.index.groups) < {0, 1, 2, 3, 4, 5}
        assert journal.index.last_commit == 2
        assert all(journal.group_payload(seq) == b"z" * 30 for seq in journal.index.groups if seq > 3)
        journal.close()


def test_threads_may_append_at_once(tmp_path: Path):
    journal = Journal.create(tmp_path, "r", segment_bytes=2000)

    def append(first: int) -> None:
        for seq in range(first, 200, 4):
            journal.append_group(seq, b"%d" % seq * 20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    journal.close()
    reader = JournalReader(tmp_path, "r")
    assert sorted(reader.index.groups) == list(range(200))
    assert all(reader.group_payload(seq) == b"%d" % seq * 20 for seq in range(200))


def test_a_corrupt_last_commit_is_a_torn_tail(tmp_path: Path, sample_journal: tuple[Path, bytes, int, int]):
    """Its fsync may not have returned; nothing later says that it did."""
    _, content, commit_offset, groups_offset = sample_journal
    damaged = bytearray(content[:groups_offset])
    damaged[commit_offset + 45] ^= 1
    (tmp_path / FIRST).write_bytes(damaged)
    journal = Journal.open(tmp_path)
    assert journal.torn is not None
    assert journal.torn.offset == commit_offset
    assert journal.recovery(1).retrain == ((2, None),)


def test_a_corrupt_last_commit_that_a_checkpoint_knows_of_is_damage(tmp_path: Path, sample_journal: tuple[Path, bytes, int, int]):
    _, content, commit_offset, groups_offset = sample_journal
    damaged = bytearray(content[:groups_offset])
    damaged[commit_offset + 45] ^= 1
    (tmp_path / FIRST).write_bytes(damaged)
    journal = Journal.open(tmp_path)
    message = rf"{FIRST}: corrupt payload at byte {commit_offset}, though a checkpoint of step 2 was made after it.* restore the file"
    with pytest.raises(JournalError, match=message):
        journal.recovery(2)
    journal.close()
    assert (tmp_path / FIRST).read_bytes() == damaged  # nothing is changed on disk: what is left may help


def test_groups_are_taken_while_a_batch_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The event loop appends groups: it must not wait for an fsync, which may take seconds."""
    journal = Journal.create(tmp_path, "r", segment_bytes=200)  # the batch fills it: the group must not begin another under the fsync
    journal.append_group(0, b"zero")
    assert (tmp_path / FIRST).stat().st_size < 200
    fsync, syncing, go_on = os.fsync, threading.Event(), threading.Event()

    def slow(file: int) -> None:
        syncing.set()
        assert go_on.wait(20)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(journal.append_batch, BatchRecord(1, (0,)))
        assert syncing.wait(20)
        try:
            journal.append_group(1, b"one")
            assert journal.index.last_batch == 0, "a batch counts once it is durable"
            assert (tmp_path / FIRST).stat().st_size > 200
            with pytest.raises(InvariantViolation, match="group 1 is in the journal already"):
                journal.append_group(1, b"one")
        finally:
            go_on.set()
        batch.result(20)
    monkeypatch.undo()
    journal.append_commit(CommitRecord(1, "d"))
    journal.append_group(2, b"two")
    journal.close()
    assert len(list(tmp_path.glob("*.journal"))) == 2
    reader = JournalReader(tmp_path, "r")
    assert contents(reader) == [[(0, b"zero"), (1, b"one"), (2, b"two")], [BatchRecord(1, (0,))], [CommitRecord(1, "d")]]


def test_bytes_written_during_an_fsync_are_not_called_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r")
    journal.append_group(0, b"zero")
    fsync = os.fsync

    def during(file: int) -> None:
        fsync(file)
        monkeypatch.setattr(os, "fsync", fsync)
        journal.append_group(1, b"one")

    monkeypatch.setattr(os, "fsync", during)
    journal.append_batch(BatchRecord(1, (0,)))
    journal.append_group(2, b"two")
    journal.close()
    where = journal.index.groups[1].offset
    damaged = bytearray((tmp_path / FIRST).read_bytes())
    damaged[where + 41] ^= 1
    (tmp_path / FIRST).write_bytes(damaged)
    reader = JournalReader(tmp_path)
    assert reader.torn is not None, "its fsync never returned: a crash may have left it so"
    assert reader.torn.offset == where


def test_a_payload_that_goes_bad_after_opening_is_noticed(tmp_path: Path):
    journal = Journal.create(tmp_path, "r")
    journal.append_group(0, b"a" * 100)
    with (tmp_path / FIRST).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"b")
    with pytest.raises(JournalError, match="group 0 has corrupt payload"):
        journal.group_payload(0)
    with pytest.raises(JournalError, match="holds no group 7"):
        journal.group_payload(7)


def test_a_reader_follows_a_writer_across_segments(tmp_path: Path):
    journal = Journal.create(tmp_path, "r", segment_bytes=500)
    reader = JournalReader(tmp_path)
    for step in range(1, 7):
        fill(journal, 1, first=step)
        reader.refresh()
        assert contents(reader) == contents(journal)
    with (tmp_path / sorted(tmp_path.glob("*.journal"))[-1].name).open("ab") as file:
        file.write(b"VsJ1 half a header")
    reader.refresh()
    assert reader.torn is not None
    assert contents(reader) == contents(journal)


def test_a_full_disk_is_told_and_leaves_the_journal_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r")
    fill(journal, 1)
    size = (tmp_path / FIRST).stat().st_size
    write = os.pwritev

    def full(file: int, parts: list[memoryview], offset: int) -> int:
        if offset > size:
            raise OSError(28, "No space left on device")
        return write(file, [parts[0][:30]], offset)  # the disk takes a part of the header

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(JournalError, match=rf"{FIRST}: could not write 1040 bytes \(No space left on device; \d+ bytes free"):
            journal.append_group(2, b"x" * 1000)
    assert (tmp_path / FIRST).stat().st_size == size
    assert 2 not in journal.index.groups
    journal.append_group(2, b"x" * 1000)
    journal.close()
    assert JournalReader(tmp_path).group_payload(2) == b"x" * 1000


def test_a_segment_that_cannot_be_made_is_told_and_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r", segment_bytes=400)
    fill(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr(segments, "sync_directory", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(JournalError, match=r"00000002.journal: could not write"):
            fill(journal, 2, first=2)
    journal.append_batch(BatchRecord(2, (2, 3)))  # the groups were taken: only batches and commits begin segments
    journal.append_commit(CommitRecord(2, "d"))
    fill(journal, 1, first=3)
    written = contents(journal)
    journal.close()
    assert contents(JournalReader(tmp_path)) == written


def test_after_a_failed_fsync_nothing_more_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r")
    journal.append_group(0, b"x")

    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(JournalError, match=r"fsync failed \(Input/output error\)"):
            journal.append_batch(BatchRecord(1, (0,)))
    with pytest.raises(JournalError, match="takes no more records: fsync failed"):
        journal.append_group(1, b"x")
    assert journal.index.last_batch == 0


def test_commits_are_fsynced_before_append_returns_and_groups_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.create(tmp_path, "r")
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    journal.append_group(0, b"x")
    assert synced == []
    journal.append_batch(BatchRecord(1, (0,)))
    journal.append_commit(CommitRecord(1, "d"))
    assert synced[-1] == (tmp_path / FIRST).stat().st_size
    assert len(synced) == 2


WRITER = textwrap.dedent(
    """
    import sys
    from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, RecoveryRecord
    from verst.journal.log import Journal
    journal = Journal.create(sys.argv[1], "r", segment_bytes=200_000)
    for step in range(1, 10_000):
        for seq in (2 * step - 2, 2 * step - 1):
            journal.append_group(seq, bytes([seq % 256]) * 20_000)
        journal.append_batch(BatchRecord(step, (2 * step - 2, 2 * step - 1)))
        journal.append_commit(CommitRecord(step, f"digest-{step}"))
        sys.stdout.write(f"{step}\\n")
        sys.stdout.flush()
    """
)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_killed_writer_loses_nothing_it_had_committed(tmp_path: Path, steps: int):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    committed = 0
    while committed < steps:
        committed = int(writer.stdout.readline())
    JournalReader(tmp_path, "r")  # while it writes
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split()
    writer.stdout.close()
    writer.wait(10)
    committed = int(rest[-1]) if rest else committed

    journal = Journal.open(tmp_path, "r")
    assert journal.index.last_commit >= committed
    for step in journal.index.commits:
        assert journal.commit(step).digest == f"digest-{step}"
        assert all(journal.group_payload(seq) == bytes([seq % 256]) * 20_000 for seq in journal.batch(step).groups)
    journal.append_group(1_000_000, b"goes on")
    journal.close()


def test_a_run_directory_has_one_holder(tmp_path: Path):
    with RunLock(tmp_path), pytest.raises(RunLocked, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-"):
        RunLock(tmp_path)
    RunLock(tmp_path).release()
    (tmp_path / "run.lock").write_text("")  # a holder that has not yet written who it is
    with RunLock(tmp_path):
        (tmp_path / "run.lock").write_text("{")
        with pytest.raises(RunLocked, match="another process"):
            RunLock(tmp_path)


def test_a_killed_holder_frees_the_directory(tmp_path: Path):
    code = "import sys; from verst.journal.lock import RunLock; l = RunLock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
    with pytest.raises(RunLocked, match=f"process {holder.pid} on"):
        RunLock(tmp_path)
    holder.kill()
    holder.stdout.close()
    holder.stdin.close()
    holder.wait(10)
    RunLock(tmp_path).release()
