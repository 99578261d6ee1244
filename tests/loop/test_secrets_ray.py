"""A whole run under Ray, started with keys in its environment: no process that runs user code shows one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loop.local import prompts_file
from tests.loop.nosy import NAMED, PLANTED
from verst.journal.log import JournalReader
from verst.observe.sinks import read_rows
from verst.runtime.rundir import RunDirectory

pytestmark = pytest.mark.slow


def run_command(*words: str, directory: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "verst.cli", *words]
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_user_code_of_a_run_sees_no_keys_but_those_that_it_names(tmp_path: Path, model: Path):
    config = {
        "run": {"dir": str(tmp_path), "steps": 1, "secrets": [NAMED]},
        "model": {"path": str(model)},
        "data": {"path": prompts_file(tmp_path), "max_prompt_tokens": 128},
        "rollout": {"group_size": 2, "max_new_tokens": 4, "max_running": 8, "environment": "tests.loop.nosy:Environment"},
        "reward": {"function": "tests.loop.nosy:reward"},
        "filters": {"functions": {"tests.loop.nosy:keep": {}}},
        "hooks": {"classes": {"tests.loop.nosy:Hook": {}}},
        "algorithm": {"name": "grpo", "dynamic_sampling": False, "loss": "tests.loop.nosy:loss"},
        "train": {"groups_per_step": 2},
        "checkpoint": {"export_final": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))
    root = Path(__file__).parents[2]
    environment = {**os.environ, **PLANTED, NAMED: "named", "PYTHONPATH": str(root)}
    run_command("train", str(file), directory=tmp_path, environment=environment)
    run, _ = RunDirectory.open(tmp_path / "run")
    reader = JournalReader(run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    assert found
    for trajectory in found:
        assert trajectory.info == {"seen": [], "code": [], "ran": True, "named": "named"}
        assert trajectory.reward == 10
    step = next(row for row in read_rows(run.metrics) if row["kind"] == "step")
    assert (step["custom/seen"], step["custom/named"]) == (0, 1)
    assert (step["policy/seen"], step["policy/named"]) == (0, 1)
    text = b"".join(file.read_bytes() for file in run.root.rglob("*") if file.is_file())
    assert not any(value.encode() in text for value in PLANTED.values())
    words = ["--prompts", "2", "--samples", "2", "--out", str(tmp_path / "eval.json")]
    run_command("eval", str(run.root), *words, directory=tmp_path, environment=environment)
    (measured,) = json.loads((tmp_path / "eval.json").read_text())
    assert [row["rewards"] for row in measured["rows"]] == [[10, 10]] * 2  # in this command's process environments see no more
