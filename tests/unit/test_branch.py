"""`verst train --from RUN@STEP`: weights, optimizer and place in the data of another run, and nothing else of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run
from tests.loop.test_run import stopped_after
from tests.unit.conftest import last_letters
from verst.config.load import load_config
from verst.errors import CheckpointError, ConfigError, ModelError
from verst.journal.log import JournalReader
from verst.runtime.branch import open_branch
from verst.runtime.listing import summarize
from verst.runtime.profiling import profile_step
from verst.runtime.trainer_worker import TrainerWorker
from verst.testing import tiny_model


def branch_of(parent: LocalRun, directory: Path, tiny: Path, prompts: Path, step: int, name: str = "b", **sections: Any) -> LocalRun:
    values = {
        "run": {"name": name, "dir": str(directory), "steps": 2, "seed": 1},
        "data": {"path": str(prompts), "holdout": 0.3, "max_prompt_tokens": 64},
        "checkpoint": {"every_steps": 1, "keep": 1},
    }
    return local_run(directory, tiny, values | sections, begin_from=f"{parent.run.root}@{step}", reward=last_letters)


def digests(run: LocalRun) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(step).digest for step in range(1, reader.index.last_commit + 1)]


def prompts_of(run: LocalRun, steps: range) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.group(seq).prompt.id for step in steps for seq in (*reader.batch(step).groups, *reader.batch(step).dropped)]


async def test_a_branch_goes_on_in_the_data_and_keeps_its_lineage(done_run: LocalRun, tmp_path: Path, tiny: Path, prompts: Path):
    branch = await branch_of(done_run, tmp_path, tiny, prompts, 2).go()
    reader = JournalReader(done_run.run.journal)
    lineage = json.loads((branch.run.root / "run.json").read_text())["lineage"]
    assert lineage == {
        "run": str(done_run.run.root),
        "run_id": done_run.run.run_id,
        "step": 2,
        "digest": reader.commit(2).digest,
    }
    # the parent's steps 3 and 4 had the same prompts, in the same order, but for those dropped, which are recorded with a later batch
    ours, theirs = prompts_of(branch, range(1, 3)), prompts_of(done_run, range(3, 5))
    assert set(ours) & set(theirs)
    assert not set(ours) & set(prompts_of(done_run, range(1, 3)))
    assert [r["step"] for r in branch.rows if r["kind"] == "step"] == [1, 2]
    assert branch.run.run_id != done_run.run.run_id
    assert summarize(branch.run.root).begun_from == "done@2"
    profiled = await asyncio.to_thread(profile_step, branch.run.root, 1, tmp_path / "profile", device="cpu")
    assert (profiled.begun_from, profiled.same_weights) == ("the checkpoint that the run began from", True)


async def test_it_begins_with_weights_moments_and_a_schedule_of_its_own(done_run: LocalRun, tmp_path: Path, tiny: Path, prompts: Path):
    branch = branch_of(done_run, tmp_path, tiny, prompts, 2, train={"groups_per_step": 4, "threads": 1, "lr": 1e-3, "schedule": "linear"})
    parent, own = (TrainerWorker(load_config(run.run.config), 0, "cpu") for run in (done_run, branch))
    for worker in (parent, own):
        worker.start(None)
    parent.restore(str(done_run.run.checkpoints), 2)
    own.restore(str(branch.run.origin), 0)
    before, after = parent.backend.state(), own.backend.state()
    assert before.tensors.keys() == after.tensors.keys()
    assert all((before.tensors[n] == after.tensors[n]).all() for n in before.tensors)  # masters and both moments
    assert any(n.startswith("exp_avg_sq/") and bool(t.any()) for n, t in after.tensors.items())
    assert (before.values["update"], before.values["stepped"]) == (2, 2)
    assert (after.values["update"], after.values["stepped"]) == (0, 2)
    await branch.go()
    assert branch.metric("update/lr") == [1e-3, 5e-4]


async def test_the_origin_outlives_its_parent_and_its_own_checkpoints(done_run: LocalRun, tmp_path: Path, tiny: Path, prompts: Path):
    """Killed before its first checkpoint, with the parent gone: it starts from its own copy and reaches the same weights."""
    whole = await branch_of(done_run, tmp_path, tiny, prompts, 2, "whole").go()
    shutil.copytree(done_run.run.root, tmp_path / "parent")
    parent = LocalRun(type(done_run.run)(tmp_path / "parent"))
    broken = branch_of(parent, tmp_path, tiny, prompts, 2, "broken", checkpoint={"every_steps": 100})
    shutil.rmtree(tmp_path / "parent")
    await stopped_after(broken, 1)
    await broken.go()
    assert "resumed at step 0 (checkpoint): 1 journaled steps to train again" in " ".join(broken.lines)
    assert digests(broken) == digests(whole)
    (broken.run.origin / "step-00000000" / "rank-00000-of-00001.safetensors").unlink()
    shutil.rmtree(broken.run.checkpoints)
    broken.run.checkpoints.mkdir()
    with pytest.raises(CheckpointError, match="rank-00000-of-00001"):  # and never from the initial model
        await broken.go()


async def test_other_data_begins_at_its_start(done_run: LocalRun, tmp_path: Path, tiny: Path):
    rows = tmp_path / "other.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": "1"}) + "\n" for i in range(16)))
    branch = branch_of(done_run, tmp_path, tiny, rows, 4, data={"path": str(rows), "shuffle": False, "max_prompt_tokens": 64})
    await branch.go()
    assert JournalReader(branch.run.journal).group(0).prompt.messages[0].content == "say 0"
    made = open_branch(f"{done_run.run.root}@4", load_config(branch.run.config))
    assert made.line(branch.run.stream).endswith("at the start of other data; steps and schedule count from 0")


def test_what_cannot_be_begun_from_is_named(done_run: LocalRun, tmp_path: Path, tiny: Path, prompts: Path):
    root = done_run.run.root
    with pytest.raises(CheckpointError, match="no checkpoint of step 3: its checkpoints are of: 2, 4"):
        branch_of(done_run, tmp_path, tiny, prompts, 3)
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match=rf"another model than .*wide \(head_dim 8 and 16, hidden_size 32 and 64\): set model.path={tiny}"):
        branch_of(done_run, tmp_path, wide, prompts, 2)
    config = load_config(done_run.run.config)
    other = config.model_copy(update={"train": config.train.model_copy(update={"backend": "megatron"})})
    with pytest.raises(ConfigError, match=r"trained by fsdp, this one has train.backend megatron.*verst export"):
        open_branch(f"{root}@2", other)
    with pytest.raises(ConfigError, match="not a run"):
        open_branch(str(tmp_path / "nowhere"), config)
    assert not (tmp_path / "b").exists()


def test_without_a_step_it_is_the_newest_checkpoint(done_run: LocalRun):
    assert open_branch(str(done_run.run.root), load_config(done_run.run.config)).checkpoint.step == 4
