"""On which ranks and threads a replay trains which steps, of a run that was resumed on others."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from verst.config.load import load_config
from verst.errors import CheckpointError
from verst.journal.log import Journal
from verst.journal.records import BatchRecord, CommitRecord
from verst.runtime.changes import change, stretches, unrecorded
from verst.runtime.replay_plan import Plan, plan_replay
from verst.runtime.rundir import RunDirectory
from verst.training.checkpoints import FileRecord, commit_checkpoint


class Run:
    """A run's directory, to which steps, checkpoints and changes of options are added as a run does it."""

    def __init__(self, directory: Path, **train: object) -> None:
        values = {"run": {"name": "r", "dir": str(directory), "steps": 20}, "model": {"path": "m"}, "train": train}
        self.run, self.config = RunDirectory.open(RunDirectory.create(load_config(values), None, {}).root)

    def commit(self, to: int) -> None:
        with closing(Journal.open(self.run.journal, self.run.run_id)) as journal:
            for step in range(journal.index.last_commit + 1, to + 1):
                journal.append_batch(BatchRecord(step, ()))
                journal.append_commit(CommitRecord(step, "hash"))

    def checkpoint(self, step: int) -> None:
        partial = self.run.checkpoints / f"step-{step:08d}.partial"
        partial.mkdir()
        (partial / "rank-00000-of-00001.safetensors").write_bytes(b"")
        empty = FileRecord("rank-00000-of-00001.safetensors", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        commit_checkpoint(self.run.checkpoints, step, [empty], fingerprint={}, loop={}, keep=5)

    def change(self, *overrides: str) -> None:
        self.config = change(self.run, self.config, overrides, lambda line: None)

    def plan(self, begin: int, to: int | None = None) -> Plan:
        return plan_replay(self.run, self.config, begin, to)


def legs(plan: Plan) -> list[tuple[int, int, int, int, int | None]]:
    """Ranks, begun, committed, last and hands_over of each."""
    return [(leg.config.train.ranks, leg.begun, leg.committed, leg.last, leg.hands_over) for leg in plan.legs]


def test_a_run_on_the_same_ranks_is_one_leg_from_the_newest_checkpoint(tmp_path: Path):
    run = Run(tmp_path)
    run.commit(6)
    run.checkpoint(2)
    run.checkpoint(5)
    run.change("run.steps=30")  # which has no part in the bits of a step
    assert legs(run.plan(0)) == [(1, 0, 0, 6, None)]
    assert legs(run.plan(4)) == [(1, 2, 0, 6, None)]
    assert legs(run.plan(5)) == [(1, 5, 0, 6, None)]
    assert legs(run.plan(2, 4)) == [(1, 2, 0, 4, None)]


def test_after_an_orderly_end_the_next_ranks_go_on_where_the_former_ended(tmp_path: Path):
    run = Run(tmp_path, ranks=2)
    run.commit(4)
    run.checkpoint(4)
    run.change("train.ranks=1")
    run.commit(6)
    assert legs(run.plan(0)) == [(2, 0, 0, 4, 4), (1, 4, 4, 6, None)]
    assert legs(run.plan(0, 4)) == [(2, 0, 0, 4, None)]
    assert legs(run.plan(4)) == [(1, 4, 4, 6, None)]
    assert run.plan(0).measured_again == set()


def test_steps_behind_the_checkpoint_are_trained_twice_after_a_crash(tmp_path: Path):
    run = Run(tmp_path, ranks=2)
    run.commit(4)
    run.checkpoint(2)
    run.change("train.ranks=1")
    run.checkpoint(3)  # as it trains steps 3 and 4 again
    run.commit(6)
    assert legs(run.plan(0)) == [(2, 0, 0, 4, 2), (1, 2, 4, 6, None)]
    assert legs(run.plan(2)) == [(2, 2, 0, 4, 2), (1, 2, 4, 6, None)]
    assert legs(run.plan(4)) == [(1, 2, 4, 6, None)]  # the committed step 4 is no part of what comes after it
    plan = run.plan(3)
    assert legs(plan) == [(2, 2, 0, 4, 2), (1, 2, 4, 6, None)]
    assert plan.notes == ("checkpoint of step 3 skipped: that step was trained twice, on other ranks or threads the second time",)
    assert plan.measured_again == {3, 4}


def test_a_change_that_committed_nothing_is_followed_through(tmp_path: Path):
    run = Run(tmp_path)
    run.commit(4)
    run.checkpoint(1)
    run.change("train.ranks=2")
    run.checkpoint(3)  # of steps 2 and 3 on two ranks
    run.change("train.threads=2")
    run.commit(5)
    assert legs(run.plan(0)) == [(1, 0, 0, 4, 1), (2, 1, 4, 3, 3), (2, 3, 4, 5, None)]
    assert [leg.config.train.threads for leg in run.plan(0).legs] == [1, 1, 2]
    assert legs(run.plan(4)) == [(2, 1, 4, 3, 3), (2, 3, 4, 5, None)]


def test_two_changes_before_a_start_are_one(tmp_path: Path):
    run = Run(tmp_path)
    run.commit(4)
    run.checkpoint(4)
    run.change("train.ranks=2")
    run.change("train.ranks=3")
    run.commit(5)
    assert legs(run.plan(0)) == [(1, 0, 0, 4, 4), (3, 4, 4, 5, None)]


def test_a_layout_is_given_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.runtime.preflight.check_stack", lambda config: None)  # which needs the model's files
    run = Run(tmp_path, backend="megatron", ranks=2, megatron={"tensor-model-parallel-size": 2, "recompute_granularity": "full"})
    run.commit(1)
    run.checkpoint(1)
    run.change("train.megatron.tensor-model-parallel-size=1", "train.megatron.pipeline_model_parallel_size=2", "train.threads=2")
    first, second = stretches(run.run, run.config)
    assert first.config.train.megatron == {"tensor_model_parallel_size": 2, "recompute_granularity": "full"}
    assert (first.config.train.threads, second.config.train.threads) == (1, 2)
    assert second.config is run.config


def test_a_run_that_went_back_behind_its_second_checkpoint_is_refused(tmp_path: Path):
    run = Run(tmp_path)
    run.commit(4)
    run.checkpoint(2)
    run.checkpoint(3)
    run.change("train.ranks=2")
    run.commit(5)
    (run.run.checkpoints / "step-00000003").rename(tmp_path / "elsewhere")
    run.change("train.ranks=1")
    run.commit(6)
    with pytest.raises(CheckpointError, match=r"went back to step 2 .*Replay from a step after 5"):
        run.plan(0)


def test_options_that_were_changed_by_hand_are_found_beside_those_that_may_differ(tmp_path: Path):
    run = Run(tmp_path)
    before = run.config.model_dump(mode="json")
    run.change("train.ranks=2", "run.steps=30")
    by_hand = load_config(run.run.config, ["train.threads=3", "train.lr=1", "eval.every_steps=0", "checkpoint.every_steps=7"])
    assert unrecorded(run.run, before, run.config) == {}
    assert unrecorded(run.run, before, by_hand) == {"train.lr": (1e-06, 1), "train.threads": (1, 3)}
