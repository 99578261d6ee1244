"""`verst audit`: each violation is found in a journal made by hand, and a sound one has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.loop.fakes import group
from tests.loop.local import LocalRun
from verst import cli
from verst.cli.audit import _lines
from verst.errors import JournalError
from verst.journal.audit import Audit, audit
from verst.journal.codec import encode_group
from verst.journal.frames import Kind, pack_header
from verst.journal.lock import RunLock
from verst.journal.log import Journal
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, Record, RecoveryRecord
from verst.journal.segments import create_segment, index_path, segment_path
from verst.journal.sidecar import index_of

Item = Record | tuple[int, int]  # a group: its number, and the version that sampled it

SOUND: list[Item] = [
    PublishRecord(0, "d0", (0,)),
    *(AdmitRecord(seq, f"p{seq}", 0) for seq in range(4)),
    *((seq, 0) for seq in (1, 0, 2)),
    BatchRecord(1, (0, 1), {2: "no signal"}),
    CommitRecord(1, "d1"),
    PublishRecord(1, "d1", (0, 1)),
    (3, 0),
    AdmitRecord(4, "p4", 1),
    FaultRecord("replica 1", "exit code 137", 1, 1.0),
    RecoveryRecord("replica 1", 1, "replacement", 2.5, 2.0),
    AdmitRecord(4, "p4", 1),  # again: it had been in flight there
    (4, 1),
    ConfigRecord(1, {"rollout.replicas": [1, 2]}),
    BatchRecord(2, (3, 4)),
    CommitRecord(2, "d2"),
    PublishRecord(2, "d2", (0, 1)),
    AdmitRecord(5, "p5", 2),
    AdmitRecord(6, "p6", 2),
    (5, 2),
]


def frame(item: Item, durable_bytes: int = 0) -> bytes:
    if isinstance(item, tuple):
        seq, version = item
        payload, kind, key = encode_group(group(seq, version)), Kind.GROUP, seq
    else:
        payload, kind, key = item.to_json(), item.kind, item.key
    return pack_header(kind, key, payload, durable_bytes=durable_bytes) + payload


def written(directory: Path, items: Sequence[Item]) -> Path:
    """A journal of raw frames, which no writer has checked."""
    directory.mkdir(parents=True, exist_ok=True)
    create_segment(directory, 1, "r", previous_bytes=0)
    with segment_path(directory, 1).open("ab") as file:
        file.write(b"".join(frame(item) for item in items))
    return directory


def put(item: Item, *, before: Item | None = None) -> list[Item]:
    place = len(SOUND) if before is None else SOUND.index(before)
    return [*SOUND[:place], item, *SOUND[place:]]


def swapped(old: Item, new: Item) -> list[Item]:
    return [new if item == old else item for item in SOUND]


def test_a_sound_journal(tmp_path: Path):
    found = audit(written(tmp_path, SOUND), "r", checkpoints=[2, 1], worst_staleness=1, exact=True)
    size = segment_path(tmp_path, 1).stat().st_size
    assert found == Audit(
        run_id="r",
        segments=1,
        bytes_checked=size,
        groups_admitted=7,
        groups_finished=6,
        groups_unfinished=[6],
        groups_trained=4,
        groups_pending=1,
        dropped={"no signal": 1},
        batches=2,
        digests={1: "d1", 2: "d2"},
        published={0: "d0", 1: "d1", 2: "d2"},
        staleness={0: 3, 1: 1},
        checkpoints=[1, 2],
        changes=[ConfigRecord(1, {"rollout.replicas": [1, 2]})],
        faults=[FaultRecord("replica 1", "exit code 137", 1, 1.0)],
        recoveries=[RecoveryRecord("replica 1", 1, "replacement", 2.5, 2.0)],
    )
    assert found.ok


def test_a_step_in_progress_is_no_violation(tmp_path: Path):
    found = audit(written(tmp_path, [*SOUND, BatchRecord(3, (), {5: "failed"})]))
    assert (found.violations, found.batches, len(found.digests), found.groups_pending) == ([], 3, 2, 0)
    assert found.dropped == {"no signal": 1, "failed": 1}
    found = audit(written(tmp_path / "b", [*SOUND, BatchRecord(3, (5,))]))
    assert (found.violations, found.groups_in_training, found.groups_trained) == ([], 1, 4)


LATE = CommitRecord(1, "d1")
BATCH_1, BATCH_2 = BatchRecord(1, (0, 1), {2: "no signal"}), BatchRecord(2, (3, 4))


@pytest.mark.parametrize(
    ("items", "violation"),
    [
        (put((3, 0)), "group 3 is finished twice"),
        (put((5, 2)), "group 5 is finished twice"),
        (put((7, 2)), "group 7 is finished, but was not admitted"),
        (put(AdmitRecord(3, "p3", 2)), "group 3 was admitted again though it is finished"),
        (put(AdmitRecord(8, "p8", 2)), "group 8 was admitted where group 7 comes next"),
        (put(AdmitRecord(7, "p7", 3)), "group 7 was admitted with version 3, which no step had made"),
        (swapped((4, 1), (4, 0)), "group 4 has tokens of version 0, but the engines served 1 when it was admitted"),
        (swapped((4, 1), (4, 2)), "step 2 trains group 4, whose tokens are of version 2: no step had made that"),
        (put(BatchRecord(3, (5, 3))), "step 3 takes group 3, which step 2 has taken"),
        (put(BatchRecord(3, (5, 5))), "step 3 takes group 5, which step 3 has taken"),
        (put(BatchRecord(3, (5,), {2: "again"})), "step 3 takes group 2, which step 1 has taken"),
        (put(BatchRecord(3, (5, 6))), "step 3 takes group 6, which is not finished"),
        (put(BatchRecord(4, (5,))), "the batch of step 4 comes where that of step 3 must"),
        (put(BatchRecord(2, (5,))), "the batch of step 2 comes where that of step 3 must"),
        (put(BatchRecord(3, (), {5: ""})), "step 3 drops group 5 without a reason"),
        (swapped(LATE, ConfigRecord(0, {})), "step 2 has a batch before step 1 is committed"),
        (put(CommitRecord(3, "d3")), "step 3 is committed, but has no batch before that"),
        (put(CommitRecord(2, "d2")), "step 2 is committed where step 3 must be"),
        (put(CommitRecord(4, "d4")), "step 4 is committed where step 3 must be"),
        (swapped(LATE, CommitRecord(1, "")), "step 1 is committed without a weights hash"),
        (put(PublishRecord(1, "d1", (0,)), before=LATE), "the engines served version 1 before step 1 was committed"),
        (put(PublishRecord(3, "d3", (0,))), "the engines served version 3 before step 3 was committed"),
        (put(PublishRecord(2, "d2", ())), "version 2 is served by no replica"),
        (put(PublishRecord(2, "other", (0,))), "the engines served version 2 with the weights other, but those of its commit are d2"),
        (put(PublishRecord(0, "other", (0,))), "the engines served version 0 with the weights other, but those of its commit are d0"),
    ],
)
def test_each_violation_is_found(tmp_path: Path, items: list[Item], violation: str):
    found = audit(written(tmp_path, items), exact=True)
    assert any(violation in line for line in found.violations), found.violations
    assert found.violations[0].startswith("00000001.journal, byte ")
    assert not found.ok


def test_other_weights_after_a_restart_are_told_where_they_may_be(tmp_path: Path):
    found = audit(written(tmp_path, put(PublishRecord(2, "other", (0,)))))
    assert found.ok
    said = "the engines served version 2 with the weights other, but those of its commit are d2"
    assert found.notes == [f"{said}: the step was trained again, with other rounding"]


def test_staleness_beyond_the_bound(tmp_path: Path):
    found = audit(written(tmp_path, SOUND), worst_staleness=0)
    assert [line.partition(": ")[2] for line in found.violations] == ["step 2 trains group 3, which is 1 versions old: the bound is 0"]


def test_a_checkpoint_of_no_commit(tmp_path: Path):
    found = audit(written(tmp_path, SOUND), checkpoints=[2, 3])
    assert found.violations == ["there is a checkpoint of step 3, which was not committed"]


def test_records_that_are_none(tmp_path: Path):
    directory = written(tmp_path, SOUND)
    with segment_path(directory, 1).open("ab") as file:
        for kind, payload in ((Kind.COMMIT, b"[]"), (Kind.GROUP, b"no arrow"), (Kind.SEGMENT, b"{}")):
            file.write(pack_header(kind, 6, payload, durable_bytes=0) + payload)
    found = [line.partition(": ")[2] for line in audit(directory).violations]
    assert found[0].startswith("a record COMMIT cannot be read")
    assert "is not a 'group/3' Arrow stream" in found[1]
    assert found[2] == "a segment has its segment record at its start only"


# ---- files


def rolled(directory: Path) -> Path:
    """The sound journal in several segments, by the real writer."""
    journal = Journal.create(directory, "r", segment_bytes=3000)
    for item in SOUND:
        match item:
            case AdmitRecord():
                journal.append_admitted(item)
            case BatchRecord():
                journal.append_batch(item)
            case CommitRecord():
                journal.append_commit(item)
            case PublishRecord():
                journal.append_published(item)
            case ConfigRecord():
                journal.append_configured(item)
            case FaultRecord():
                journal.append_fault(item)
            case RecoveryRecord():
                journal.append_recovery(item)
            case (int(seq), int(version)):
                journal.append_group(seq, encode_group(group(seq, version)))
    journal.close()
    assert len(list(directory.glob("*.journal"))) >= 3
    return directory


def test_a_sound_journal_of_several_segments(tmp_path: Path):
    one, several = audit(written(tmp_path / "one", SOUND), "r"), audit(rolled(tmp_path / "several"), "r")
    assert several.segments >= 3
    assert replace(several, segments=1, bytes_checked=one.bytes_checked) == one
    assert several.bytes_checked == sum(path.stat().st_size for path in (tmp_path / "several").iterdir())


def test_what_was_given_up_still_proves_that_it_was_trained_once(tmp_path: Path):
    directory = rolled(tmp_path)
    before = audit(directory, checkpoints=[2], worst_staleness=1)
    gone = Journal.open(directory).give_up(2, 1)
    found = audit(directory, checkpoints=[2], worst_staleness=1)
    assert (found.violations, found.segments_given_up) == ([], len(gone))
    assert (found.groups_trained, found.groups_finished, found.dropped) == (before.groups_trained, before.groups_finished, before.dropped)
    assert (found.digests, found.published) == (before.digests, before.published)
    assert sum(found.staleness.values()) + found.staleness_unknown == before.groups_trained
    assert found.staleness_unknown > 0
    path = index_path(directory, gone[0])
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert audit(directory).violations[0].startswith(f"{path.name}: no whole index at byte 0, and its segment was given up")


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_byte_is_checked(tmp_path: Path):
    directory = rolled(tmp_path)
    for path in sorted(directory.glob("*.journal"))[:-1]:
        before = path.read_bytes()
        for place in (0, 50, len(before) // 2, len(before) - 1):
            damage(path, place)
            found = audit(directory)
            assert any(line.startswith(f"{path.name}: corrupt") for line in found.violations), (path.name, place)
            path.write_bytes(before)
    assert audit(directory).ok


def test_an_unfinished_end_is_told_and_a_damaged_one_is_a_violation(tmp_path: Path):
    directory = written(tmp_path, SOUND)
    path = segment_path(directory, 1)
    content = path.read_bytes()
    path.write_bytes(content + frame((6, 2))[:-3])
    found = audit(directory)
    assert found.ok
    assert found.notes == [f"00000001.journal ends with {len(frame((6, 2))) - 3} bytes that are unfinished (incomplete frame)"]
    durable = frame(AdmitRecord(7, "p", 2), durable_bytes=len(content))  # says that all before it had reached the disk
    path.write_bytes(content[:-1] + b"?" + durable)
    assert audit(directory).violations[0].startswith("00000001.journal: corrupt payload at byte ")


def test_missing_renamed_and_shortened_segments(tmp_path: Path):
    directory = rolled(tmp_path)
    second, third = segment_path(directory, 2), segment_path(directory, 3)
    before = second.read_bytes()
    second.unlink()
    assert audit(directory).violations[0] == "00000002.journal is missing, though it was not given up"
    index_path(directory, 2).rename(tmp_path / "aside")
    assert audit(directory).violations[0] == "00000002.journal is missing"
    second.write_bytes(third.read_bytes())
    assert "00000002.journal was written as segment 3" in audit(directory).violations
    first = 40 + int.from_bytes(before[24:32], "little")
    second.write_bytes(before[:first])
    expected = f"00000003.journal says that {len(before)} bytes were written before it, but {first} are there"
    assert expected in audit(directory).violations
    second.write_bytes(frame(AdmitRecord(9, "p", 0)) + before[first:])
    assert "00000002.journal begins without its segment record" in audit(directory).violations


def test_index_files_are_held_against_their_segments(tmp_path: Path):
    directory = rolled(tmp_path)
    path = index_path(directory, 1)
    before = path.read_bytes()
    damage(path, len(before) - 1)
    assert audit(directory).notes == ["00000001.index: corrupt index at byte 0; it is made anew when the run is resumed"]
    true = index_of(directory, 1)
    replace(true, crcs_F=true.crcs_F + 1).write(directory)
    assert audit(directory).violations == ["00000001.index says otherwise than its segment: remove it, and it is made anew"]
    path.unlink()
    assert audit(directory).ok


def test_what_cannot_be_audited_at_all(tmp_path: Path):
    with pytest.raises(JournalError, match="holds no journal"):
        audit(tmp_path)
    written(tmp_path, SOUND)
    with pytest.raises(JournalError, match="belongs to run 'r', not 'other'"):
        audit(tmp_path, "other")
    payload = json.dumps({"format": 1, "run_id": "r", "previous_bytes": 0}).encode()
    segment_path(tmp_path, 1).write_bytes(pack_header(Kind.SEGMENT, 1, payload, durable_bytes=0) + payload)
    with pytest.raises(JournalError, match="has journal format 1, this version of Verst reads 2"):
        audit(tmp_path)


# ---- the command


def test_the_command_says_yes(done_run: LocalRun, capsys: pytest.CaptureFixture[str]):
    root = done_run.run.root
    assert cli.main(["audit", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "every group exactly once: yes"
    assert any(line.startswith("served       versions 0 to ") for line in lines)
    with RunLock(root):
        assert cli.main(["audit", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["lives"], found["violations"]) == (True, True, [])
    assert len(found["digests"]) == found["batches"] == len(done_run.metric("version"))


def test_of_a_loss_a_person_is_shown_the_first_line():
    """Ray tells of the death of a process in ten."""
    found = Audit(faults=[FaultRecord("replica 1", "it died\n\tclass_name: Host", 1, 1.0)])
    assert "fault        after step 1: replica 1: it died" in _lines(found, lives=False, bound=0)
