"""Options that change at a step, in whole runs: told, journaled, and the same bits after a crash and in a replay."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import local_run, prompts_file, stopped_after
from tests.loop.rewards import spread, tied_in_odd_groups
from verst.journal.log import JournalReader
from verst.runtime.changes import change
from verst.runtime.replay import replay
from verst.runtime.rundir import RunDirectory

CHANGES = [
    {"step": 2, "options": {"train.lr": 1e-4, "algorithm.kl_coefficient": 1.0}},
    {"step": 4, "options": {"train.lr": 1e-3}},
]


def values(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"steps": 5, "changes": CHANGES},
        "data": {"path": prompts_file(directory)},
        "algorithm": {"name": "grpo", "kl_coefficient": 0.1},
        "checkpoint": {"every_steps": 2},
    }
    return {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}


async def test_a_crash_between_changes_alters_nothing_and_a_replay_has_the_same_bits(tmp_path: Path, model: Path):
    whole = await local_run(tmp_path / "whole", model, values(tmp_path), reward=spread).go()
    crashed = local_run(tmp_path / "crashed", model, values(tmp_path), reward=spread)
    await stopped_after(crashed, 3)
    await crashed.go()
    journals = [JournalReader(run.run.journal, run.run.run_id) for run in (whole, crashed)]
    digests = [[journal.commit(step).digest for step in range(1, 6)] for journal in journals]
    assert digests[0] == digests[1]
    assert whole.metric("update/lr") == [1e-3, 1e-4, 1e-4, 1e-3, 1e-3]
    assert [line for line in whole.lines if line.startswith("from step")] == [
        "from step 2: train.lr 0.001 -> 0.0001",
        "from step 2: algorithm.kl_coefficient 0.1 -> 1.0",
        "from step 4: train.lr 0.0001 -> 0.001",
    ]
    assert [journals[0].batch(step).changed for step in (1, 2, 4)] == [
        {},
        {"train.lr": [1e-3, 1e-4], "algorithm.kl_coefficient": [0.1, 1.0]},
        {"train.lr": [1e-4, 1e-3]},
    ]
    found = await asyncio.to_thread(replay, whole.run.root, 0, echo=lambda line: None)
    assert found.first_difference is None
    assert len(found.steps) == 5


async def test_a_resumed_run_learns_at_another_rate_from_then_on(tmp_path: Path, model: Path):
    run = local_run(tmp_path, model, values(tmp_path, run={"steps": 4, "changes": []}), reward=spread)
    await stopped_after(run, 2)
    change(*RunDirectory.open(run.run.root), ["run.changes=[{step: 3, options: {train.lr: 1e-5}}]"], print)
    await run.go()
    assert run.metric("update/lr") == [1e-3, 1e-3, 1e-5, 1e-5]
    found = await asyncio.to_thread(replay, run.run.root, 0, echo=lambda line: None)
    assert found.first_difference is None


async def test_groups_are_dropped_from_the_step_on(tmp_path: Path, model: Path):
    """Half of the groups have no signal: the first step trains them, the second drops them."""
    changes = [{"step": 2, "options": {"algorithm.dynamic_sampling": True}}]
    run = await local_run(tmp_path, model, values(tmp_path, run={"steps": 2, "changes": changes}), reward=tied_in_odd_groups).go()
    assert run.metric("reward/groups_without_signal")[0] == pytest.approx(0.5)
    assert run.metric("groups/replaced") == [0, 3]  # groups 5, 7 and 9, between 4, 6, 8 and 10
