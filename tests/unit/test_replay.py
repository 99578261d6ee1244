"""`verst replay`: steps trained again are the steps that happened, nothing in the run is touched, and what differs is noticed and named."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import verst
from tests.loop.local import LocalRun
from tests.unit.test_branch import branch_of
from tests.unit.test_profiling import files_of
from verst import cli
from verst.errors import CheckpointError, ConfigError, JournalError, ModelError, VerstError
from verst.journal.codec import encode_group
from verst.journal.lock import RunLock
from verst.journal.log import SEGMENT_BYTES, Journal, JournalReader
from verst.journal.records import CommitRecord
from verst.runtime import standalone
from verst.runtime.replay_plan import plan_replay
from verst.runtime.replayed import Replayed
from verst.runtime.rundir import RunDirectory
from verst.runtime.trainer_worker import TrainerWorker
from verst.types import Group


def replayed(run: Path, begin: int, to: int | None = None) -> tuple[Replayed, list[str]]:
    told: list[str] = []
    return verst.replay(run, begin, to, echo=told.append), told


def copied(run: LocalRun, path: Path) -> Path:
    shutil.copytree(run.run.root, path)
    return path


def rewritten(
    run: Path,
    group: Callable[[Group], Group] = lambda group: group,
    commit: Callable[[CommitRecord], CommitRecord] = lambda commit: commit,
    segment_bytes: int = SEGMENT_BYTES,
) -> Path:
    """Writes the run's journal anew, with some records changed: each is intact, and not all of them are what happened."""
    directory, _ = RunDirectory.open(run)
    old, target = JournalReader(directory.journal, directory.run_id), run / "journal.new"
    with closing(Journal.create(target, directory.run_id, segment_bytes=segment_bytes)) as new:
        for step in range(1, old.index.last_commit + 1):
            for seq in old.batch(step).taken:
                new.append_group(seq, encode_group(group(old.group(seq))))
            new.append_batch(old.batch(step))
            new.append_commit(commit(old.commit(step)))
    shutil.rmtree(directory.journal)
    target.rename(directory.journal)
    return run


@pytest.mark.parametrize(
    ("begin", "to", "begun_from", "steps"),
    [
        (0, None, "the initial model", [1, 2, 3, 4]),
        (2, None, "the checkpoint of step 2", [3, 4]),
        (1, 3, "the initial model", [1, 2, 3]),
        (3, 4, "the checkpoint of step 2", [3, 4]),
    ],
)
def test_the_committed_weights_come_out_and_the_run_is_not_touched(
    done_run: LocalRun, begin: int, to: int | None, begun_from: str, steps: list[int]
):
    assert any(JournalReader(done_run.run.journal).batch(step).dropped for step in range(1, 5)), "no group was dropped"
    before = files_of(done_run.run.root)
    found, told = replayed(done_run.run.root, begin, to)
    assert (found.begun_from, [step.step for step in found.steps], found.to) == (begun_from, steps, steps[-1])
    assert all(step.same for step in found.steps)
    assert {metric: difference for metric, (difference, _) in found.largest_differences.items()} == {
        "loss/total": 0.0,
        "update/grad_norm": 0.0,
    }
    assert [line.split("  ")[0] for line in told if line.startswith("step ")] == [f"step {step}" for step in steps if step > begin]
    assert any("on the way, without lines" in line for line in told) == (steps[0] <= begin)
    assert files_of(done_run.run.root) == before


def test_a_run_that_lives_is_replayed_to_its_last_commit(done_run: LocalRun, tmp_path: Path):
    run = copied(done_run, tmp_path / "run")
    with RunLock(run):
        before = files_of(run)
        found, _ = replayed(run, 3)
    assert [step.same for step in found.steps] == [True, True]
    assert files_of(run) == before


def test_a_run_that_was_killed_while_it_wrote_is_replayed(done_run: LocalRun, tmp_path: Path):
    run = copied(done_run, tmp_path / "run")
    (segment,) = (run / "journal").glob("*.journal")
    with segment.open("ab") as file:
        file.write(b"half a record")
    (run / "metrics.jsonl").unlink()
    found, told = replayed(run, 2, 3)
    assert found.first_difference is None
    assert any("13 bytes at byte" in line for line in told)
    assert found.lines()[-1] == "metrics.jsonl has no metrics of these steps to compare with"


async def test_a_branch_is_replayed_from_where_it_began(done_run: LocalRun, tmp_path: Path, tiny: Path, prompts: Path):
    branch = await branch_of(done_run, tmp_path, tiny, prompts, 2).go()
    found, _ = await asyncio.to_thread(replayed, branch.run.root, 0)
    assert (found.begun_from, [step.same for step in found.steps]) == ("the checkpoint that the run began from", [True, True])


def test_a_changed_group_is_noticed(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changed = JournalReader(done_run.run.journal).batch(2).groups[1]

    def more_reward(group: Group) -> Group:
        first, *others = group.trajectories
        return replace(group, trajectories=(replace(first, reward=(first.reward or 0) + 1), *others)) if group.seq == changed else group

    run = rewritten(copied(done_run, tmp_path / "run"), group=more_reward)
    assert cli.main(["replay", str(run), "--from", "0"]) == 1
    said = capsys.readouterr().out.splitlines()
    committed = JournalReader(done_run.run.journal)
    (line,) = [line for line in said if line.startswith("step 1  ")]
    assert line.endswith(f"  weights {committed.commit(1).digest} as committed")
    assert ["DIFFER" in line for line in said if line.startswith("step ")] == [False, True, True, True]
    (first,) = [line for line in said if "other weights than committed" in line]
    assert first.startswith("3 of 4 steps have other weights than committed; the first is step 2: ")
    assert first.endswith(f", committed {committed.commit(2).digest}")
    # on policy, advantages of a group add up to 0 whatever its rewards are, and so does the loss of completions of one length
    assert "  the loss of step 2 is the recorded one, its gradient norm is not: its rewards or its backward pass are others" in said
    largest = re.fullmatch(r"largest difference from metrics\.jsonl: loss \S+ \(step \d\), grad norm (\S+) \(step \d\)", said[-1])
    assert largest, said[-1]
    assert float(largest[1]) > 1e-5


def test_an_edited_option_is_named(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copied(done_run, tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.002"))
    described = json.loads((run / "run.json").read_text())
    described["packages"]["torch"] = "1.0"
    (run / "run.json").write_text(json.dumps(described))
    assert cli.main(["replay", str(run), "--from", "0", "--to", "1", "--json"]) == 1
    shown = capsys.readouterr()
    found: dict[str, Any] = json.loads(shown.out)
    assert (found["same"], found["first_difference"], found["from"], found["to"]) == (False, 1, 0, 1)
    option, package, place, unknown = found["causes"]
    assert option == "train.lr is 0.002 in config.yaml, and was 0.001 at step 4"
    assert package.startswith("torch 1.0 then, ")
    assert place == "loss and gradient norm of step 1 are the recorded ones: its update is another"
    assert unknown == "not recorded, so not compared: the kind of processor or GPU, and the files of the model"
    assert found["steps"][0]["metrics"] == found["steps"][0]["recorded"]
    assert shown.err.startswith("replays step 1 of ")


def test_a_run_that_does_not_repeat_its_bits_is_named(done_run: LocalRun, tmp_path: Path):
    run = copied(done_run, tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("deterministic: true", "deterministic: false"))
    found, _ = replayed(run, 2, 3)
    assert found.first_difference is not None  # rows are not padded to a number that repeats sums
    assert found.causes[:2] == (
        "run.deterministic is false: kernels of a GPU may add numbers in another order each time",
        "run.deterministic is False in config.yaml, and was True at step 4",
    )
    assert found.causes[-1] == "not recorded, so not compared: the kind of processor or GPU"


@pytest.mark.parametrize(
    ("begin", "to", "error", "message"),
    [
        (-1, None, ConfigError, "--from -1: give a step whose state to begin with"),
        (3, 2, ConfigError, "--to 2 does not come after --from 3"),
        (2, 2, ConfigError, "--to 2 does not come after --from 2"),
        (0, 9, JournalError, "--to 9: the last committed step of .* is 4"),
        (4, None, JournalError, "--from 4: the last committed step of .* is 4; give --from below 4"),
    ],
)
def test_steps_that_are_none_say_which_there_are(done_run: LocalRun, begin: int, to: int | None, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        replayed(done_run.run.root, begin, to)


def test_a_checkpoint_or_journal_of_another_run_is_refused(done_run: LocalRun, tmp_path: Path):
    run = copied(done_run, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000003")
    plan = plan_replay(*RunDirectory.open(run), 3, None)
    assert plan.begun_from == "the checkpoint of step 2"
    assert "step-00000003 holds the checkpoint of step 4: a directory was renamed" in plan.notes[0]
    rewritten(run, commit=lambda commit: replace(commit, digest="0" * 32) if commit.step == 2 else commit)
    with pytest.raises(CheckpointError, match=rf"step-00000002 has the weights hash .*, but the journal committed {'0' * 32} for step 2"):
        replayed(run, 2)
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"run_id": "another"}))
    with pytest.raises(JournalError, match="belongs to run"):
        replayed(run, 0)


def test_groups_that_were_given_up_are_told_before_anything_is_trained(done_run: LocalRun, tmp_path: Path):
    run = rewritten(copied(done_run, tmp_path / "run"), segment_bytes=1)  # so that a segment ends with each batch and each commit
    with closing(Journal.open(run / "journal")) as journal:
        assert journal.give_up(2, 0)
    with pytest.raises(JournalError, match=r"the groups of step 2 were given up by retention .*, so .*; give --from 2 or later"):
        replayed(run, 0)
    found, _ = replayed(run, 2)
    assert [step.same for step in found.steps] == [True, True]


def test_a_checkpoint_that_a_living_run_removes_meanwhile_is_told(done_run: LocalRun, tmp_path: Path):
    run = copied(done_run, tmp_path / "run")

    def tell(line: str) -> None:
        shutil.rmtree(run / "checkpoints" / "step-00000002")

    with pytest.raises(CheckpointError, match=r"step-00000002 was removed meanwhile, as a run that goes on does .*: replay again"):
        verst.replay(run, 2, echo=tell)


def test_each_rank_has_a_gpu_or_none_has():
    assert [standalone._device_of_each(2, gpus) for gpus in (0, 2, 4)] == [("cpu", 0.0), ("cuda", 1.0), ("cuda", 1.0)]
    with pytest.raises(ConfigError, match=r"train\.ranks 2: each rank needs a GPU, as in the run, and there are 1"):
        standalone._device_of_each(2, 1)


async def test_a_trainer_that_cannot_start_says_why_though_it_cannot_be_closed_either(done_run: LocalRun, monkeypatch: pytest.MonkeyPatch):
    def fails(error: VerstError) -> Callable[..., None]:
        def call(*args: Any) -> None:
            raise error

        return call

    monkeypatch.setattr(TrainerWorker, "start", fails(ModelError("the model has gone away")))
    monkeypatch.setattr(TrainerWorker, "close", fails(VerstError("not closed")))
    _, config = RunDirectory.open(done_run.run.root)
    with pytest.raises(ModelError, match="the model has gone away"):
        async with standalone.rank_here(config, "cpu"):
            raise AssertionError("it has started")
