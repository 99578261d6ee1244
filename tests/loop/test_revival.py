"""Trainer ranks are lost in the middle of a run: the loop brings them back to the last commit, and does the step again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.loop.fakes import FakeParts, config
from tests.loop.test_loop import loop_of, run
from verst.journal.log import JournalReader
from verst.runtime import revival
from verst.runtime.lease import Lease
from verst.runtime.recovery import Cursor, Restored
from verst.runtime.revival import GivenUp

MOMENTS = [
    f"{moment} {step}"
    for moment in ("load", "forward", "optimizer", "publish", "snapshot", "send", "checkpoint", "written")
    for step in (1, 2, 4)
]
STEPS = 4
ALL = list(range(2 * STEPS))


def parts_of(directory: Path, *lost: str, capacity: int = 2, shared: bool = False, reads_trainers: bool = False) -> FakeParts:
    cfg = config(
        run={"steps": STEPS},
        rollout={"group_size": 2, "capacity_groups": capacity, "deadline_s": 5.0},
        checkpoint={"every_steps": 1, "export_final": True},
    )
    parts = FakeParts(cfg, directory, shared=shared)
    parts.trainers.lose = list(lost)
    parts.reads_trainers = reads_trainers
    return parts


def sound(parts: FakeParts, directory: Path) -> None:
    """What was trained, committed and served in the end is what nobody disturbed."""
    assert parts.trainers.trained == ALL
    assert not parts.trainers.lose, "not all of it was lost"
    reader = JournalReader(directory / "journal")
    assert [reader.commit(step).digest for step in range(1, STEPS + 1)] == [
        " ".join(map(str, ALL[: 2 * step])) for step in range(1, STEPS + 1)
    ]
    assert sorted(reader.index.groups) == ALL
    assert parts.serving == STEPS
    assert reader.publish(STEPS).digest == reader.commit(STEPS).digest


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("capacity", [2, 6])
@pytest.mark.parametrize("moment", [*MOMENTS, "publish 0", "send 0", "export"])
async def test_a_loss_at_any_moment_changes_nothing(tmp_path: Path, moment: str, capacity: int):
    parts = parts_of(tmp_path, moment, capacity=capacity, reads_trainers=True)
    await run(parts.config, parts)
    sound(parts, tmp_path)
    faults = JournalReader(tmp_path / "journal").faults()
    assert [f"trainer rank 1 died ({moment})"] == [fault.reason for fault in faults]


@pytest.mark.parametrize("moment", ["load 2", "optimizer 3", "send 2", "publish 4"])
async def test_where_devices_are_shared_they_come_back_in_their_own_turn(tmp_path: Path, moment: str):
    parts = parts_of(tmp_path, moment, capacity=2, shared=True, reads_trainers=True)
    await run(parts.config, parts)
    sound(parts, tmp_path)
    rebuilt = parts.events.index("rebuild")
    turns = [event for event in parts.events[:rebuilt] if event in ("engines release", "engines resume")]
    assert not turns or turns[-1] == "engines release", "nobody else may have the device's memory"


async def test_steps_since_the_newest_snapshot_are_trained_again(tmp_path: Path):
    parts = parts_of(tmp_path, "forward 4")
    parts.kept_every = 2
    parts.trainers.saved = {}
    await run(parts.config, parts)
    sound(parts, tmp_path)
    assert [event for event in parts.events if event.startswith("optimizer")] == [f"optimizer {s}.0" for s in (1, 2, 3, 3, 4)]
    (back,) = JournalReader(tmp_path / "journal").recoveries()
    assert (back.source, back.step) == ("snapshot", 2)
    assert any("restored to step 2 from memory" in note and "steps 3 to 3 are trained again" in note for note in parts.notes)


async def test_a_version_that_is_lost_on_its_way_is_not_waited_for_while_its_step_is_trained_again(tmp_path: Path):
    """Where engines read the trainers' weights: the next update waits for those of the version before to have left."""
    parts = parts_of(tmp_path, "send 3", reads_trainers=True)
    parts.kept_every = 2
    parts.trainers.saved = {}
    await run(parts.config, parts)
    sound(parts, tmp_path)
    (back,) = JournalReader(tmp_path / "journal").recoveries()
    assert (back.source, back.step) == ("snapshot", 2)


async def test_without_a_snapshot_the_run_begins_again_from_its_first_model(tmp_path: Path):
    parts = parts_of(tmp_path, "optimizer 2")
    parts.kept_every = 100
    await run(parts.config, parts)
    sound(parts, tmp_path)
    (back,) = JournalReader(tmp_path / "journal").recoveries()
    assert (back.source, back.step) == ("model", 0)


async def test_a_loss_while_they_come_back_is_one_more(tmp_path: Path):
    parts = parts_of(tmp_path, "load 2", "rebuild", "publish 2")
    await run(parts.config, parts)
    sound(parts, tmp_path)
    assert len(JournalReader(tmp_path / "journal").faults()) == 3


async def test_weights_that_come_out_otherwise_stop_the_run(tmp_path: Path):
    parts = parts_of(tmp_path, "forward 4")
    parts.kept_every = 2
    after_commit = parts.after_commit

    async def spoiled(step: int, digest: str) -> None:
        await after_commit(step, digest)
        if step == 2:
            parts.kept[2] = [7, *parts.kept[2][1:]]

    parts.after_commit = spoiled
    with pytest.raises(Exception, match="step 3 was trained again from the journal and its weights hash is 7 1 2 3 4 5, not 0 1 2 3 4 5"):
        await run(parts.config, parts)


async def test_a_step_that_loses_them_again_and_again_ends_the_run(tmp_path: Path):
    parts = parts_of(tmp_path, *["forward 3"] * 9)
    with pytest.raises(GivenUp) as ended:
        await run(parts.config, parts)
    assert "the trainers were lost 4 times in step 3" in str(ended.value)
    assert f"verst resume {tmp_path}" in str(ended.value)
    parts = FakeParts(parts.config, tmp_path)
    todo = parts.journal.recovery(0)
    assert [step for step, _ in todo.retrain] == [1, 2, 3]


async def test_losses_with_steps_between_them_do_not_add_up(tmp_path: Path):
    parts = parts_of(tmp_path, *(f"{moment} {step}" for step in range(1, STEPS + 1) for moment in ("load", "forward", "optimizer")))
    await run(parts.config, parts)
    sound(parts, tmp_path)
    assert len(JournalReader(tmp_path / "journal").faults()) == 3 * STEPS


async def test_a_pull_that_lost_the_trainers_holds_its_slots_until_the_version_is_there(tmp_path: Path):
    """Groups of the version on its way keep their slots: staleness is bounded through a loss, too."""
    parts = parts_of(tmp_path, "send 1", capacity=4, reads_trainers=True)
    loop = loop_of(parts.config, parts, Restored(0, Cursor(0, parts.stream.state())))
    await asyncio.wait_for(loop.run(), 20)
    sound(parts, tmp_path)
    assert max(row["staleness/max"] for row in parts.rows.values()) <= parts.config.worst_staleness


def test_the_fakes_have_the_lease_of_a_run(tmp_path: Path):
    assert isinstance(parts_of(tmp_path).lease, Lease)
