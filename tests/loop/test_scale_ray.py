"""`verst scale` from another terminal, on a run that `verst train` made under its own Ray, with weights by broadcast."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
import yaml

from tests.loop.local import prompts_file
from tests.loop.test_kill import committed, finish, start, wait_until
from verst.journal.log import JournalReader
from verst.observe.sinks import read_rows
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def reward_processes(of: int) -> int:
    """Each replica has one, which ends with it."""
    count = 0
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or is a zombie
            count += "verst.rewards.worker" in child.cmdline()
    return count


def test_two_and_one_again_while_it_trains(tmp_path: Path):
    values = {
        "run": {"name": "r", "dir": str(tmp_path), "steps": 10_000, "seed": 3},
        "model": {"path": str(tiny_model(tmp_path / "model"))},
        "data": {"path": prompts_file(tmp_path), "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16, "capacity_groups": 8},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 4, "lr": 1e-3},
        "weights": {"transport": "group"},
        "checkpoint": {"every_steps": 10_000, "export_final": False},
    }
    file, run = tmp_path / "run.yaml", tmp_path / "r"
    file.write_text(yaml.safe_dump(values))
    training = start("train", file, start_new_session=True)
    try:
        wait_until(training, lambda: committed(run) >= 2)
        grown = finish(start("scale", run, "rollout=2", "--wait", "100"))
        assert reward_processes(training.pid) == 2
        since = committed(run)
        wait_until(training, lambda: committed(run) >= since + 3)
        shrunk = finish(start("scale", run, "rollout=1", "--wait", "100"))
        assert reward_processes(training.pid) == 1
        since = committed(run)
        wait_until(training, lambda: committed(run) >= since + 2)
    finally:
        os.killpg(training.pid, signal.SIGINT)
        output, _ = training.communicate(timeout=100)
    assert training.returncode == 130, output
    assert grown.splitlines()[-2].startswith("replica 1 serves from version ")
    assert grown.splitlines()[-1] == "2 replica(s) serve"
    assert shrunk.splitlines()[-1] == "1 replica(s) serve"
    assert all(f"scale: {line}" in output for line in (grown + shrunk).splitlines() if not line.startswith("asked"))
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "step"]
    assert {row["replicas"] for row in rows} == {1.0, 2.0}
    assert max(row["staleness/max"] for row in rows) <= 1
    assert max(row["mismatch/probe"] for row in rows) < 1e-5
    reader = JournalReader(run / "journal")
    trained = [seq for step in range(1, len(rows) + 1) for seq in reader.batch(step).groups]
    assert trained == list(range(4 * len(rows)))
    _, config = RunDirectory.open(run)
    assert config.rollout.replicas == 1
