"""The loop against fakes: order of events, staleness, drops, stops, resumes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.loop.fakes import EndingStream, FakeParts, FakeStream, config, group
from verst.config.schema import Config
from verst.errors import DataError, DeadlineExceeded, EngineFailure, InvariantViolation, TrainingDiverged
from verst.journal.audit import audit
from verst.journal.codec import encode_group
from verst.journal.log import Journal
from verst.journal.records import PublishRecord
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, JournaledBatch, Restored
from verst.runtime.trainer_worker import Published
from verst.runtime.transfer import Brought
from verst.types import NO_VERSION, Group, Message, Prompt


def loop_of(cfg: Config, parts: FakeParts, restored: Restored | None = None) -> Loop:
    return Loop(cfg, cast(Parts, parts), restored or Restored(0, Cursor(0, parts.stream.state())))


async def run(cfg: Config, parts: FakeParts, restored: Restored | None = None) -> Loop:
    loop = loop_of(cfg, parts, restored)
    await asyncio.wait_for(loop.run(), 20)
    assert audit(parts.journal.directory, worst_staleness=cfg.worst_staleness).violations == []
    return loop


async def test_synchronous_training_takes_every_group_once_in_order(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    await run(config(), parts)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]
    # a group is rolled on the version its step trains: staleness 0
    assert sorted(parts.rolled) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [parts.rows[s]["staleness/max"] for s in (1, 2, 3)] == [0, 0, 0]


async def test_the_commit_is_durable_before_the_engines_see_the_version(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    committed: list[int] = []
    pull = parts.bring

    async def checked_pull(published: Published, probe_T: Any) -> Brought:
        committed.append(parts.journal.index.last_commit)
        return await pull(published, probe_T)

    parts.bring = checked_pull
    await run(config(), parts)
    assert committed == [0, 1, 2, 3]  # version v is pulled when commit v is in the journal


async def test_admissions_and_publishes_are_journaled(tmp_path: Path):
    """Each with the version that the engines served, and in the order of events."""
    cfg = config(rollout={"group_size": 2, "capacity_groups": 4})
    parts = FakeParts(cfg, tmp_path)
    await run(cfg, parts)
    journal = parts.journal
    assert sorted(journal.index.admitted) == list(range(6))
    assert [journal.publish(v) for v in range(4)] == [PublishRecord(v, " ".join(map(str, range(2 * v))), (0,)) for v in range(4)]
    for seq, version in parts.rolled:
        assert journal.admission(seq).version <= version
        assert journal.index.published[journal.admission(seq).version] < journal.index.admitted[seq] < journal.index.groups[seq]


async def test_what_was_generated_before_the_probe_was_compared_is_held_back(tmp_path: Path):
    """Engines serve a version as soon as its checksums match. If the probe then disagrees, nothing of it is in the journal."""
    cfg = config(rollout={"group_size": 2, "capacity_groups": 4})
    rolled_on: dict[int, int] = {}
    serves, later = asyncio.Event(), asyncio.Event()

    async def roll(seq: int, version: int) -> Group:
        if seq >= 2:  # beside the first step's training; it ends on the next version
            await serves.wait()
            later.set()
        rolled_on[seq] = parts.serving
        return group(seq, version)

    async def verdict(version: int) -> None:
        if version == 1:
            serves.set()
            await later.wait()
            await asyncio.sleep(0.05)  # time enough to accept what must not be accepted
            raise TrainingDiverged("version 1: trainer and engine disagree")

    parts = FakeParts(cfg, tmp_path, roll)
    parts.verdict = verdict
    with pytest.raises(TrainingDiverged, match="version 1"):
        await run(cfg, parts)
    assert {seq for seq, version in rolled_on.items() if version == 1}
    assert set(parts.journal.index.groups) == {seq for seq, version in rolled_on.items() if version == 0}


async def test_slots_are_freed_only_after_the_verified_pull(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    parts.pull_s = 0.02
    await run(config(), parts)
    for seq, version in parts.rolled:
        assert version == seq // 2, "a group was admitted before the engines held the weights of the step before"


@pytest.mark.parametrize(("capacity", "bound"), [(2, 0), (3, 1), (4, 1), (5, 2), (8, 3)])
async def test_staleness_stays_within_its_bound(tmp_path: Path, capacity: int, bound: int):
    cfg = config(run={"steps": 8}, rollout={"group_size": 2, "capacity_groups": capacity})
    assert cfg.worst_staleness == bound
    parts = FakeParts(cfg, tmp_path, seed=capacity)
    await run(cfg, parts)
    worst = max(row["staleness/max"] for row in parts.rows.values())
    assert worst <= bound
    assert (worst > 0) == (capacity > 2), "a larger capacity must really run ahead"
    assert parts.trainers.trained == list(range(16))


async def test_a_window_lets_early_groups_pass_a_late_one_and_no_further(tmp_path: Path):
    """Group 1 is finished last of all; the others are as soon as they are admitted."""
    cfg = config(run={"steps": 4}, rollout={"group_size": 2, "capacity_groups": 6, "window_groups": 4})
    late = asyncio.Event()

    async def roll(seq: int, version: int) -> Group:
        if seq == 1:
            await late.wait()
        return group(seq, version)

    parts = FakeParts(cfg, tmp_path, roll)
    running = asyncio.create_task(run(cfg, parts))
    for _ in range(200):
        await asyncio.sleep(0.005)
        if len(parts.trainers.trained) == 4:
            break
    await asyncio.sleep(0.1)
    assert sorted(parts.trainers.trained) == [0, 2, 3, 4]  # the window of 1 ends with 4; 5 and 6 have to wait
    late.set()
    await running
    assert 1 in parts.trainers.trained[4:]
    assert len(set(parts.trainers.trained)) == 8
    assert all(parts.trainers.trained[i] < parts.trainers.trained[i + 1] for i in (0, 2, 4, 6)), "a batch is in the order of admission"


async def test_tokens_older_than_the_bound_are_never_trained(tmp_path: Path):
    parts = FakeParts(config(), tmp_path, roll=lambda seq, version: group(seq, 0))
    with pytest.raises(InvariantViolation, match=r"step 2 would train sample 2/0, whose oldest token is of version 0: 1 versions behind"):
        await run(config(), parts)
    assert parts.trainers.trained == [0, 1]


async def test_several_updates_make_one_step_and_one_commit(tmp_path: Path):
    cfg = config(train={"groups_per_step": 2, "minibatches": 2, "epochs": 2})
    parts = FakeParts(cfg, tmp_path)
    await run(cfg, parts)
    assert [e for e in parts.events if e.startswith("optimizer 1")] == [f"optimizer 1.{u}" for u in range(4)]
    assert parts.journal.index.last_commit == 3


async def test_a_group_that_failed_is_dropped_recorded_and_replaced(tmp_path: Path):
    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: group(seq, v, (None, 1.0) if seq == 1 else (0.0, 1.0)))
    await run(config(), parts)
    assert parts.trainers.trained == [0, 2, 3, 4, 5, 6]
    assert parts.journal.batch(1).dropped == {1: "1 of 2 trajectories failed: the reward raised"}
    assert any("group 1 (p1) dropped: 1 of 2 trajectories failed: the reward raised" in n for n in parts.notes)


async def test_drops_are_counted_and_only_those_in_a_row_end_the_run(tmp_path: Path):
    cfg = config(run={"steps": 4})
    bad = {s for s in range(60) if s % 4}  # three of four: six drops for each step, never four in a row
    parts = FakeParts(cfg, tmp_path, roll=lambda seq, v: group(seq, v, (None, None) if seq in bad else (0.0, 1.0)))
    await run(cfg, parts)
    assert parts.trainers.trained == [0, 4, 8, 12, 16, 20, 24, 28]
    assert sum(row["groups/dropped"] for row in parts.rows.values()) == 21
    assert parts.rows[2]["rollout/failed"] == pytest.approx(6 / 8)


def flat(seq: int, version: int) -> Group:
    """Of four groups one has a gradient; of the others all are right or all wrong."""
    return group(seq, version, (0.0, 1.0) if seq % 4 == 3 else (float(seq % 2),) * 2)


async def test_groups_without_signal_are_replaced_and_counted(tmp_path: Path):
    cfg = config(algorithm={"name": "grpo", "dynamic_sampling": True})
    parts = FakeParts(cfg, tmp_path, flat)
    await run(cfg, parts)
    assert parts.trainers.trained == [3, 7, 11, 15, 19, 23]
    assert [parts.rows[s]["groups/replaced"] for s in (1, 2, 3)] == [6, 6, 6]
    assert {parts.rows[s]["groups/dropped"] for s in (1, 2, 3)} == {0}
    assert parts.rows[1]["reward"] == pytest.approx((2 * 0.5 + 2 * (0 + 1 + 0)) / 8)  # of all that was generated, not of what was kept
    assert parts.journal.batch(1).dropped == {seq: f"all its rewards are equal ({float(seq % 2)})" for seq in (0, 1, 2, 4, 5, 6)}
    plain = FakeParts(config(), tmp_path / "plain", flat)
    await run(config(), plain)
    assert plain.trainers.trained == [0, 1, 2, 3, 4, 5]


async def test_a_task_without_any_signal_ends_the_run(tmp_path: Path):
    cfg = config(algorithm={"name": "grpo", "dynamic_sampling": True})
    parts = FakeParts(cfg, tmp_path, lambda seq, version: group(seq, version, (1.0, 1.0)))
    with pytest.raises(
        DataError,
        match=r"step 1: 41 groups were dropped because .* \(the last: all its rewards are equal \(1.0\)\) before a batch was whole",
    ):
        await run(cfg, parts)


async def test_the_last_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.runtime.saving.commit_checkpoint", lambda *args, **kwargs: None)  # the fake trainer writes no files
    cfg = config(checkpoint={"every_steps": 1, "export_final": False})
    parts = FakeParts(cfg, tmp_path)
    await run(cfg, parts)
    assert [e for e in parts.events if e.startswith("snapshot")] == ["snapshot 1", "snapshot 2", "snapshot 3"]


async def test_trajectories_are_given_up_after_a_checkpoint_that_does_not_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As soon as a checkpoint is whole, as far as the oldest one that is kept allows; and once is told if that is not far enough."""

    def commit(directory: Path, step: int, *_: object, keep: int, **__: object) -> None:
        (directory / f"step-{step:08d}").mkdir(parents=True)
        if step > keep:
            (directory / f"step-{step - keep:08d}").rmdir()

    monkeypatch.setattr("verst.runtime.saving.commit_checkpoint", commit)
    limit = 20_000
    checkpoint = {"every_steps": 1, "keep": 2, "export_final": False, "journal_limit_bytes": limit}
    cfg = config(run={"steps": 12}, checkpoint=checkpoint)
    Journal.create(tmp_path / "journal", "test-run").close()
    parts = FakeParts(cfg, tmp_path)
    parts.journal = Journal.open(tmp_path / "journal", segment_bytes=4_000)
    await run(cfg, parts)
    assert parts.journal.given_up
    kept = [seq for seq in parts.journal.index.groups if parts.journal.keeps(seq)]
    assert set(kept) >= {22, 23}, "those of step 12: the oldest checkpoint that is kept is of step 11"
    assert any("gave up the trajectories of 1 segment(s)" in note for note in parts.notes)
    sizes = [parts.rows[step]["journal/bytes"] for step in sorted(parts.rows)]
    assert max(sizes) < 2 * limit, "it would have been larger than that"
    assert all(row["journal/write_s"] > 0 for row in parts.rows.values())
    checkpoint |= {"journal_limit_bytes": 1}
    tight = config(run={"steps": 14}, checkpoint=checkpoint)
    restored = Restored(12, Cursor(24, {"read": 24}), consumed=frozenset(range(24)))
    again = FakeParts(tight, tmp_path)
    again.stream.restore({"read": 24})
    await run(tight, again, restored)
    assert sum("above checkpoint.journal_limit_bytes 1" in note for note in again.notes) == 1


async def test_stop_ends_a_replay_between_two_steps(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    await run(config(), parts)
    again = FakeParts(config(), tmp_path)
    batches = tuple(JournaledBatch(s, (2 * s - 2, 2 * s - 1), again.journal.commit(s).digest) for s in (1, 2, 3))
    loop = loop_of(config(), again, Restored(0, Cursor(0, {"read": 0}), batches, frozenset(), frozenset(range(6))))
    loop.stop()
    await asyncio.wait_for(loop.run(), 5)
    assert again.trainers.trained == []


async def test_a_failed_member_leaves_the_rest_of_its_group_in_training(tmp_path: Path):
    cfg = config(rollout={"group_size": 3})
    parts = FakeParts(cfg, tmp_path, roll=lambda seq, v: group(seq, v, (None, 0.0, 1.0)))
    await run(cfg, parts)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]
    assert parts.rows[1]["rollout/failed"] == pytest.approx(1 / 3)


async def test_a_run_in_which_everything_fails_stops_and_says_why(tmp_path: Path):
    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: group(seq, v, (None, None)))
    with pytest.raises(
        DataError,
        match=r"groups in a row could not be trained; the last one \(group \d+, prompt p\d+\): 2 of 2 .* failed: the reward raised",
    ):
        await run(config(), parts)


async def test_groups_that_failed_before_a_restart_do_not_end_the_run_again(tmp_path: Path):
    """Else a run whose reward was broken for a while could never be resumed: its journal would hold too many of them in a row."""
    first = FakeParts(config(), tmp_path, roll=lambda seq, v: group(seq, v, (None, None)))
    with pytest.raises(DataError, match="Mend what made them fail, then go on with: verst resume"):
        await run(config(), first)
    failed = frozenset(first.journal.index.groups)
    first.journal.close()
    mended = FakeParts(config(), tmp_path)
    await run(config(), mended, Restored(0, Cursor(0, {"read": 0}), (), failed))
    assert len(mended.trainers.trained) == 6
    assert not set(mended.trainers.trained) & failed


async def test_an_engine_failure_stops_the_run_with_its_own_message(tmp_path: Path):
    def roll(seq: int, version: int) -> Any:
        if seq == 3:
            raise EngineFailure("replica 0: out of memory")
        return group(seq, version)

    parts = FakeParts(config(), tmp_path, roll=roll)
    with pytest.raises(EngineFailure, match="replica 0: out of memory"):
        await run(config(), parts)
    assert parts.journal.index.last_commit == 1  # what was committed stays committed


async def test_a_group_that_never_comes_is_named(tmp_path: Path):
    async def hang() -> None:
        await asyncio.sleep(60)

    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: hang() if seq == 1 else group(seq, v))
    parts.group_deadline_s = 0.2
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.2 s for the next of 2 groups \(1 are ready\)"):
        await run(config(), parts)


async def test_a_prompt_source_that_ends_is_an_error_not_a_hang(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    parts.stream = EndingStream(DataError("the prompts ended after 3"))
    with pytest.raises(DataError, match="the prompts ended after 3"):
        await run(config(), parts)


async def test_prompts_that_last_just_long_enough_do(tmp_path: Path):
    class Exact(FakeStream):
        def next(self) -> Any:
            if self.read == 6:
                raise DataError("the prompts ended after 6")
            return super().next()

    parts = FakeParts(config(), tmp_path)
    parts.stream = Exact()
    await run(config(), parts)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]


async def test_stop_ends_after_the_step_in_progress_with_a_checkpoint_asked_for(tmp_path: Path):
    parts = FakeParts(config(run={"steps": 100}), tmp_path)
    loop = loop_of(parts.config, parts)
    running = asyncio.create_task(loop.run())
    await parts.reported(2)
    loop.stop()
    await asyncio.wait_for(running, 5)
    assert loop.version == parts.journal.index.last_commit < 100
    assert parts.serving == loop.version
    assert f"snapshot {loop.version}" in parts.events


async def test_stop_does_not_wait_for_a_group_that_hangs(tmp_path: Path):
    async def hang() -> None:
        await asyncio.sleep(60)

    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: hang() if seq == 2 else group(seq, v))
    loop = loop_of(config(), parts)
    running = asyncio.create_task(loop.run())
    await parts.reported(1)
    loop.stop()
    await asyncio.wait_for(running, 5)
    assert loop.version == 1


async def test_resume_trains_journaled_groups_and_rolls_only_the_missing(tmp_path: Path):
    cfg = config(run={"steps": 4})
    first = FakeParts(cfg, tmp_path, roll=lambda seq, v: _fail_at(5, seq, v))
    with pytest.raises(EngineFailure):
        await run(cfg, first)
    assert first.journal.index.last_commit == 2
    first.journal.close()

    second = FakeParts(cfg, tmp_path)
    todo = second.journal.recovery(0)  # as if no checkpoint had been written: everything since the initial model is trained again
    batches = tuple(JournaledBatch(s, second.journal.batch(s).groups, d) for s, d in todo.retrain)
    finished = frozenset(todo.pending)
    restored = Restored(0, Cursor(0, {"read": 0}), batches, finished, frozenset(second.journal.index.groups) - finished)
    await run(cfg, second, restored)
    assert second.trainers.trained == list(range(8))
    assert sorted(seq for seq, _ in second.rolled)[: 8 - 5] == sorted({5, 6, 7} | ({4} - finished))[: 8 - 5]
    assert not {seq for seq, _ in second.rolled} & {0, 1, 2, 3}


async def test_prompts_that_changed_under_a_resumed_run_are_refused(tmp_path: Path):
    class Other(FakeStream):
        def next(self) -> Prompt:
            return replace(super().next(), messages=(Message("user", "another question"),))

    parts = FakeParts(config(), tmp_path)
    parts.journal.append_group(0, encode_group(group(0, 0)))
    parts.stream = Other()
    with pytest.raises(DataError, match="the data has changed since the run began: group 0 was rolled from p0"):
        await run(config(), parts, Restored(0, Cursor(0, {"read": 0}), (), frozenset({0}), frozenset()))


def _fail_at(bad: int, seq: int, version: int) -> Any:
    if seq == bad:
        raise EngineFailure("killed")
    return group(seq, version)


async def test_a_replayed_step_must_reach_the_committed_weights(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    await run(config(), parts)
    again = FakeParts(config(), tmp_path)
    batch = JournaledBatch(1, (0, 1), "other weights")
    with pytest.raises(InvariantViolation, match=r"step 1 was trained again .* its weights hash is 0 1, not other weights"):
        await run(config(), again, Restored(0, Cursor(0, {"read": 0}), (batch,), frozenset(), frozenset(range(6))))


async def test_without_determinism_other_weights_are_a_warning(tmp_path: Path):
    cfg = config(run={"steps": 1, "deterministic": False})
    parts = FakeParts(cfg, tmp_path)
    await run(cfg, parts)
    again = FakeParts(cfg, tmp_path)
    await run(cfg, again, Restored(0, Cursor(0, {"read": 0}), (JournaledBatch(1, (0, 1), "other"),), frozenset(), frozenset({0, 1})))
    assert any("warning: step 1 was trained again" in n for n in again.notes)


async def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(tmp_path: Path):
    cfg = config(checkpoint={"every_steps": 1, "export_final": True})
    parts = FakeParts(cfg, tmp_path)
    parts.trainers.disk_full = True
    await run(cfg, parts)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]
    assert sum("no space left on the fake disk" in n for n in parts.notes) >= 3
    assert "export" in parts.events


async def test_evaluation_sees_the_weights_of_its_step(tmp_path: Path):
    cfg = config(data={"holdout": 0.1}, eval={"every_steps": 2})
    parts = FakeParts(cfg, tmp_path)
    await run(cfg, parts)
    assert [e for e in parts.events if e.startswith("evaluate")] == ["evaluate 0", "evaluate 2", "evaluate 3"]


async def test_a_run_that_ends_early_lets_no_checkpoint_appear_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []

    def slow_commit(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        events.append("committed")

    monkeypatch.setattr("verst.runtime.saving.commit_checkpoint", slow_commit)
    cfg = config(checkpoint={"every_steps": 1, "export_final": False})
    parts = FakeParts(cfg, tmp_path, roll=lambda seq, v: _fail_at(2, seq, v))
    with pytest.raises(EngineFailure, match="killed"):
        await run(cfg, parts)
    events.append("ended")
    await asyncio.sleep(0.5)
    assert events == ["committed", "ended"]


# ---- devices that trainer and engines share


def turns(parts: FakeParts) -> list[str]:
    """What happened, without what does not touch the devices."""
    return [e for e in parts.events if not e.startswith(("optimizer", "report", "pull"))]


@pytest.mark.parametrize("reads_trainers", [False, True])
async def test_trainer_and_engines_use_shared_devices_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_trainers: bool):
    monkeypatch.setattr("verst.runtime.saving.commit_checkpoint", lambda *args, **kwargs: None)
    cfg = config(checkpoint={"every_steps": 2, "export_final": True}, data={"holdout": 0.1}, eval={"every_steps": 3})
    parts = FakeParts(cfg, tmp_path, shared=True)
    parts.reads_trainers = reads_trainers
    await run(cfg, parts)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]
    to_trainers = ["engines release", "trainers resume"]

    def to_engines(version: int) -> list[str]:
        if not reads_trainers:
            return ["trainers release all", "engines resume", f"serve {version}"]
        return ["trainers release state", "engines resume", f"serve {version}", "trainers release all"]

    assert turns(parts) == [
        *("publish 0", *to_engines(0), "evaluate 0"),
        *(*to_trainers, "publish 1", *to_engines(1)),
        *(*to_trainers, "publish 2", "snapshot 2", *to_engines(2)),  # the state is saved before it is given up
        *(*to_trainers, "publish 3", *to_engines(3), "evaluate 3"),
        *(*to_trainers, "snapshot 3", "export"),
    ]


async def test_devices_of_their_own_cost_no_message(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    await run(config(), parts)
    assert not [e for e in parts.events if "release" in e or "resume" in e]


async def test_on_shared_devices_rollout_runs_ahead_within_its_bound(tmp_path: Path):
    cfg = config(run={"steps": 8}, rollout={"group_size": 2, "capacity_groups": 5})
    parts = FakeParts(cfg, tmp_path, shared=True)
    parts.pull_s = 0.01
    await run(cfg, parts)
    assert 0 < max(row["staleness/max"] for row in parts.rows.values()) <= 2
    assert parts.trainers.trained == list(range(16))


async def test_nothing_is_handed_over_while_the_engines_are_not_needed(tmp_path: Path):
    cfg = Config.model_validate(
        {
            "run": {"steps": 3},
            "model": {"path": "unused"},
            "train": {"groups_per_step": 2},
            "algorithm": {"name": "sft"},
            "checkpoint": {"export_final": False},
        }
    )
    parts = FakeParts(cfg, tmp_path, lambda seq, version: group(seq, NO_VERSION), shared=True)
    await run(cfg, parts)
    first = ["publish 0", "trainers release all", "engines resume", "serve 0", "engines release", "trainers resume"]
    assert turns(parts) == [*first, "publish 1", "publish 2", "publish 3", "snapshot 3"]


async def test_a_replay_and_a_resumed_run_take_turns_too(tmp_path: Path):
    parts = FakeParts(config(), tmp_path)
    await run(config(), parts)
    cfg = config(run={"steps": 4})
    again = FakeParts(cfg, tmp_path, shared=True)
    batches = tuple(JournaledBatch(s, (2 * s - 2, 2 * s - 1), again.journal.commit(s).digest) for s in (1, 2, 3))
    await run(cfg, again, Restored(0, Cursor(0, {"read": 0}), batches, frozenset(), frozenset(range(6))))
    assert again.trainers.trained == list(range(8))
    served = [e for e in again.events if e.startswith("serve")]
    assert served == ["serve 1", "serve 2", "serve 3", "serve 3", "serve 4"]
    owner = "trainers"
    for event in again.events:
        who, _, what = event.partition(" ")
        if what == "resume":
            assert owner == "nobody", event
            owner = who
        elif what.startswith("release"):
            assert owner == who, event
            owner = "nobody"
        elif who in ("publish", "snapshot", "optimizer"):
            assert owner == "trainers", event
        elif who == "serve":
            assert owner == "engines", event


async def test_what_the_hand_overs_take_is_a_phase_of_the_step(tmp_path: Path):
    seconds: list[dict[str, float]] = []
    parts = FakeParts(config(), tmp_path, shared=True)
    parts.pull_s = 0.05
    report = parts.step

    def step(step: int, groups: Any, metrics: dict[str, float], spans: Any) -> None:
        seconds.append(spans.report())
        report(step, groups, metrics, spans)

    parts.step = step
    await run(config(), parts)
    assert len(seconds) == 3
    assert all(times["time/lease_s"] > 0.05 for times in seconds)
    assert all(abs(times["time/other_s"]) < 0.04 for times in seconds)  # nothing is counted twice


async def test_weights_that_are_read_from_the_trainers_have_left_before_the_next_update(tmp_path: Path):
    """Also if the pull begins late, as it does where groups in flight have to finish before a version."""
    cfg = config(rollout={"group_size": 2, "capacity_groups": 6})
    parts = FakeParts(cfg, tmp_path)
    parts.reads_trainers, parts.pull_s = True, 0.05
    await run(cfg, parts)
    for step in (2, 3):
        assert parts.events.index(f"serve {step - 1}") < parts.events.index(f"optimizer {step}.0")
