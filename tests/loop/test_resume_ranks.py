"""A run resumed on another number of trainer ranks goes on as if nothing had happened, up to the order of sums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import verst
from tests.loop.local import prompts_file
from verst.errors import ConfigError
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("one_ray"),
]

STEPS = 4


def config(directory: Path, name: str, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(directory), "steps": steps},
        "model": {"path": str(directory / "model")},
        "data": {"path": prompts_file(directory), "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 2, "lr": 1e-3, "ranks": 2, "microbatch_tokens": 256},
        "checkpoint": {"every_steps": 1, "keep": STEPS},
    }


def largest_difference(run: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def shards(run: Path, step: int) -> list[str]:
    return sorted(file.stem for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))


def losses(result: verst.RunResult) -> list[float]:
    return [row["loss/total"] for row in result.rows if row["kind"] == "step"]


def crashed(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as a crash would leave it: committed to the end, its last checkpoint that of `step`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}")
    return copy


def test_from_two_ranks_to_one_and_back(tmp_path: Path):
    tiny_model(tmp_path / "model")
    told: list[str] = []
    whole = verst.train(config(tmp_path, "whole", STEPS), echo=told.append)
    one = crashed(whole.path, 2, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"train\.lr cannot be changed in a run"):
        verst.resume(one, overrides=["train.lr=1", "train.ranks=1"], echo=told.append)
    told.clear()
    verst.resume(one, overrides=["train.ranks=1"], echo=told.append)
    said = "\n".join(told)
    assert "train.ranks: 2 -> 1" in said
    assert "resumed at step 2 (checkpoint): 2 journaled steps to train again" in said
    assert "train.ranks changed since: those steps will have the same weights up to rounding" in said
    assert shards(one, 4) == ["rank-00000-of-00001"]  # written again: the crash had left no checkpoint of this step
    assert largest_difference(one, whole.path) < 2e-5
    two = crashed(one, 3, tmp_path / "two")
    assert shards(two, 3) == ["rank-00000-of-00001"]
    last = verst.resume(two, overrides=["train.ranks=2"], echo=told.append)
    assert shards(two, 4) == ["rank-00000-of-00002", "rank-00001-of-00002"]
    assert largest_difference(two, whole.path) < 2e-5
    assert losses(last) == pytest.approx(losses(whole), abs=1e-5)
    changes = json.loads((two / "run.json").read_text())["changes"]
    assert [change["options"] for change in changes] == [{"train.ranks": [2, 1]}, {"train.ranks": [1, 2]}]
