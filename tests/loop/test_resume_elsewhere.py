"""A run with modules of its own, resumed from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from verst.journal.log import JournalReader
from verst.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]

BEGIN = """
from verst.config.load import load_config
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.runtime.rundir import RunDirectory

config = load_config("run.yaml")
RunDirectory.create(config, None, preflight(config, Extensions()).stream)
"""


def python(cwd: Path, *arguments: str | Path) -> None:
    """Runs Python there, with no module path but Verst's own."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_those_of_the_directory_the_run_began_in(tmp_path: Path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for directory, value in ((home, 1.0), (elsewhere, 2.0)):
        directory.mkdir()
        (directory / "mine.py").write_text(f"def score(trajectory, fields):\n    return {value}\n")
    values = {
        "run": {"name": "r", "dir": str(tmp_path), "steps": 2},
        "model": {"path": str(tiny_model(tmp_path / "model"))},
        "data": {"task": "chain_sum", "max_prompt_tokens": 128},
        "rollout": {"group_size": 2, "max_new_tokens": 4},
        "reward": {"function": "mine:score"},
        "train": {"groups_per_step": 2, "lr": 1e-3},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(values))
    python(home, "-c", BEGIN)  # a run whose processes all died before the first step
    python(elsewhere, "-m", "verst.cli", "resume", tmp_path / "r")
    reader = JournalReader(tmp_path / "r" / "journal")
    assert {t.reward for seq in reader.index.groups for t in reader.group(seq).trajectories} == {1.0}
