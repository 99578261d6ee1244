"""Processes that are killed while a run starts are replaced, and the run is what it would have been."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.campaign import replay_equals, require_sound, under
from tests.loop.local import local_run
from tests.loop.rewards import steady
from verst.fault_injection import FaultInjector
from verst.journal.log import JournalReader

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600), pytest.mark.usefixtures("token", "one_ray")]


async def test_the_start_of_a_run_survives_what_the_run_does(tmp_path: Path, model: Path, token: str):
    values = {
        "run": {"name": "run", "dir": str(tmp_path), "steps": 3, "seed": 3},
        "reward": {"workers": 1},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "ranks": 2, "deadline_s": 300},
    }
    rows = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
    run = local_run(tmp_path, model, values, reward=steady, prompts=rows)
    injector = FaultInjector()
    faults = [
        injector.plan("trainer rank 1", "trainer rank 1: start", delay_s=1.0),
        injector.plan("replica", "replica: start", delay_s=1.0),
        injector.plan("snapshot holder 0", "snapshot holder 0: open"),
    ]
    lines = await under(injector, run)
    assert [fault.struck for fault in faults] == ["trainer rank 1", "replica 0", "snapshot holder 0"]
    require_sound(run, token)
    await replay_equals(run)
    reader = JournalReader(run.run.journal)
    assert sorted(fault.role for fault in reader.faults()) == ["replica 0", "the trainers"]
    assert sorted(back.role for back in reader.recoveries() if back.source == "replacement") == ["replica 0"]
    assert any("trainer rank 1 started again after" in line for line in lines)
    # It is struck while it is opened. Where that has just ended, the next call finds it dead.
    told = re.compile(r"snapshot holder 0 died \((open|confirm)\): .*: another snapshot holder takes its place")
    assert any(map(told.match, lines))
    assert not any("no more snapshots" in line for line in lines)
