"""A limit on the mismatch in a run: no update is made of what passed it, and the run can go on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from tests.loop.fakes import FakeParts, config
from tests.loop.local import LocalRun, local_run
from tests.loop.test_run import ROWS, vowels
from verst.errors import TrainingDiverged
from verst.journal.log import JournalReader
from verst.runtime.changes import change
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, Restored
from verst.runtime.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("_one_thread")


async def run_fakes(parts: FakeParts, cfg: Any) -> None:
    await asyncio.wait_for(Loop(cfg, cast(Parts, parts), Restored(0, Cursor(0, parts.stream.state()))).run(), 20)


async def test_a_step_past_the_limit_is_stopped_before_its_first_update(tmp_path: Path):
    cfg = config(train={"groups_per_step": 2, "minibatches": 2}, fidelity={"limit": 0.01, "action": "stop"})
    parts = FakeParts(cfg, tmp_path)
    parts.trainers.k3 = {1: 0.001, 2: 0.5}
    with pytest.raises(TrainingDiverged, match=r"mismatch/k3 of step 2 is 5\.00e-01"):
        await run_fakes(parts, cfg)
    assert parts.trainers.trained == [0, 1]
    assert [event for event in parts.events if event.startswith("optimizer")] == ["optimizer 1.0", "optimizer 1.1"]
    assert parts.journal.index.last_commit == 1


async def test_a_warning_lets_the_step_through_and_is_told_once(tmp_path: Path):
    cfg = config(train={"groups_per_step": 2, "minibatches": 2})
    parts = FakeParts(cfg, tmp_path)
    parts.trainers.k3 = {1: 0.001, 2: 0.5, 3: 0.6}
    await run_fakes(parts, cfg)
    assert parts.trainers.trained == [0, 1, 2, 3, 4, 5]
    (line,) = [note for note in parts.notes if "mismatch/k3" in note]
    assert line.startswith("warning: mismatch/k3 of step 2 is 5.00e-01")


async def test_a_stopped_run_goes_on_with_a_higher_limit(tmp_path: Path, model: Path):
    """With top_k the engine samples from few tokens and the trainer scores among all: a mismatch that is no error of either."""
    values = {
        "run": {"name": "run", "dir": str(tmp_path), "steps": 2, "seed": 1},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "top_k": 3},
        "fidelity": {"limit": 0.001, "action": "stop"},
    }
    run = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
    with pytest.raises(TrainingDiverged, match=r"of step 1 is .* above fidelity\.limit \(0\.001\)"):
        await run.go()
    assert JournalReader(run.run.journal).index.last_commit == 0
    told: list[str] = []
    change(*RunDirectory.open(run.run.root), ["fidelity.limit=1000"], told.append)
    assert told == ["fidelity.limit: 0.001 -> 1000.0"]
    again = await LocalRun(run.run).go()
    assert JournalReader(run.run.journal).index.last_commit == 2
    assert [len(again.metric(name)) for name in ("mismatch/k3", "mismatch/ess", "sequences/ess_product")] == [2, 2, 2]
    assert min(again.metric("mismatch/k3")) > 0.001
