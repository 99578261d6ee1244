"""Whole runs whose trainer and engine share their device and use it in turn: the numbers are those of runs that share nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run
from tests.loop.test_run import ROWS, digests, stopped_after, vowels
from verst.journal.log import JournalReader
from verst.runtime.placement import Placement

SHARED = Placement(0.0, 0.0, shared=True)  # a CPU stands for the device: the code is the same


pytestmark = pytest.mark.usefixtures("_one_thread")


def named(tmp_path: Path, model: Path, name: str, values: dict[str, Any], **options: Any) -> LocalRun:
    run = {"name": name, "dir": str(tmp_path), "steps": 4, "seed": 1}
    return local_run(tmp_path, model, {**values, "run": run}, reward=vowels, prompts=ROWS, **options)


async def test_a_run_on_a_shared_device_has_the_same_bits(tmp_path: Path, model: Path):
    values = {
        "data": {"holdout": 0.3, "max_prompt_tokens": 64},
        "eval": {"every_steps": 2, "prompts": 4},
        "checkpoint": {"every_steps": 2},
        "algorithm": {"name": "grpo", "kl_coefficient": 0.05},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "minibatches": 2},
    }
    alone = await named(tmp_path, model, "alone", values).go()
    shared = await named(tmp_path, model, "shared", values).go(SHARED)
    assert len(digests(alone)) == 4
    assert digests(shared) == digests(alone)
    for name in ("reward", "eval/reward", "mismatch/abs_max", "policy/kl"):
        assert shared.metric(name) == alone.metric(name), name
    probes = [dict(zip(run.metric("mismatch/probe_version"), run.metric("mismatch/probe"), strict=True)) for run in (shared, alone)]
    assert set(probes[0]) == {1, 2, 3, 4}  # a turn ends with the pull; alone, a row may come before it
    assert all(probes[0][version] == probe for version, probe in probes[1].items() if version)
    assert (shared.run.final / "model.safetensors").read_bytes() == (alone.run.final / "model.safetensors").read_bytes()
    assert min(shared.metric("time/lease_s")) > 0
    assert not alone.metric("time/lease_s")


async def test_a_run_that_crashed_goes_on_on_a_shared_device(tmp_path: Path, model: Path):
    values = {"checkpoint": {"every_steps": 2}}
    whole = await named(tmp_path, model, "whole", values).go()
    broken = named(tmp_path, model, "broken", values)
    await stopped_after(broken, 3, SHARED)
    await broken.go(SHARED)
    assert "resumed at step 2 (checkpoint): 1 journaled steps to train again" in " ".join(broken.lines)
    assert digests(broken) == digests(whole)
    assert sorted(JournalReader(broken.run.journal).index.groups) == list(range(16))  # each group once


async def test_rollout_that_runs_ahead_goes_on_after_the_trainers_turn(tmp_path: Path, model: Path):
    """Requests in flight are computed anew on the weights of then; the steps are those that a fresh run makes of the same journal."""
    rollout = {"group_size": 4, "max_new_tokens": 24, "max_running": 6, "capacity_groups": 12}
    values = {"rollout": rollout, "algorithm": {"name": "grpo", "old_logprobs": "behaviour"}}
    run = await named(tmp_path, model, "ahead", values).go(SHARED)
    assert 1 <= max(run.metric("staleness/max")) <= 2
    reader = JournalReader(run.run.journal)
    trajectories = [t for seq in reader.index.groups for t in reader.group(seq).trajectories]
    assert any(len(set(t.versions_T[t.loss_mask_T])) > 1 for t in trajectories), "no request was in flight at a hand-over"
    assert max(run.metric("mismatch/abs_max")) == 0.0
