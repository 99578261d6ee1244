"""Whole runs of PPO in this process: it learns, and stops, resumes, branches and replays with the critic's state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import verst
from tests.loop.local import LocalRun, local_run, stopped_after
from tests.loop.test_run import ROWS, vowels
from verst.errors import ConfigError
from verst.journal.log import JournalReader
from verst.runtime.rundir import RunDirectory
from verst.training.checkpoints import verified
from verst.training.whole import whole_tensors

pytestmark = [pytest.mark.usefixtures("_one_thread")]

VALUES: dict[str, Any] = {
    "algorithm": {"name": "ppo", "kl_coefficient": 0.05},
    "rollout": {"group_size": 2, "max_new_tokens": 6, "max_running": 16},
    "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-2, "minibatches": 2, "epochs": 2},
    "checkpoint": {"every_steps": 1, "keep": 4},
}


def run_of(directory: Path, model: Path, **changes: dict[str, Any]) -> LocalRun:
    directory.mkdir(exist_ok=True)
    return local_run(directory, model, VALUES | changes, reward=vowels, prompts=ROWS)


def digests(run: LocalRun) -> list[str]:
    journal = JournalReader(run.run.journal, run.run.run_id)
    return [journal.commit(step).digest for step in range(1, journal.index.last_commit + 1)]


async def test_a_run_learns_and_one_that_stopped_has_its_bits(tmp_path: Path, model: Path):
    undisturbed = await run_of(tmp_path / "a", model).go()
    for row in (row for row in undisturbed.rows if row["kind"] == "step"):
        told = [row[name] for name in ("loss/total", "critic/loss", "critic/value", "critic/explained_variance", "critic/grad_norm")]
        assert np.isfinite(told).all()
        assert row["critic/skipped"] == row["update/skipped"] == 0
    assert undisturbed.metric("critic/value")[0] == 0  # its head begins with zeros
    assert undisturbed.metric("critic/value")[-1] != 0
    assert len(set(digests(undisturbed))) == 3
    stopped = run_of(tmp_path / "b", model)
    await stopped_after(stopped, 2)
    assert digests(await stopped.go()) == digests(undisturbed)
    ends = [sorted((run.run.root / "checkpoints" / "step-00000003").glob("rank-*")) for run in (undisturbed, stopped)]
    first, second = (safe_open(str(files[0]), framework="np") for files in ends)
    assert any(name.startswith("critic/") for name in first.keys())  # noqa: SIM118
    assert all(np.array_equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys())  # noqa: SIM118
    checkpoint = verified(stopped.run.root / "checkpoints" / "step-00000003")
    exported = dict(whole_tensors(checkpoint, RunDirectory.open(stopped.run.root)[1]))
    assert "score.weight" not in exported
    assert not any(name.startswith("critic") for name in exported)
    found = await asyncio.to_thread(verst.replay, stopped.run.root, 1, echo=stopped.lines.append)
    assert [step.same for step in found.steps] == [True, True]


async def test_the_policy_waits_for_the_critic(tmp_path: Path, model: Path):
    changes = {"algorithm": VALUES["algorithm"] | {"critic_warmup_steps": 2}}
    run = await run_of(tmp_path / "warm", model, **changes).go()
    first, second, third = digests(run)
    assert first == second != third
    assert run.metric("update/skipped") == [1, 1, 0]
    assert run.metric("critic/skipped") == [0, 0, 0]


async def test_a_run_begins_from_one_that_has_a_critic_too(tmp_path: Path, model: Path):
    parent = await run_of(tmp_path / "parent", model, run={"steps": 1}).go()
    (tmp_path / "child").mkdir()
    child = local_run(
        tmp_path / "child", model, VALUES | {"run": {"steps": 1}}, begin_from=str(parent.run.root), reward=vowels, prompts=ROWS
    )
    assert (await child.go()).metric("critic/value") != [0]
    with pytest.raises(ConfigError, match="only ppo has a critic"):
        local_run(tmp_path / "child", model, {"run": {"name": "other"}}, begin_from=str(parent.run.root), reward=vowels, prompts=ROWS)
