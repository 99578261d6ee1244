"""A run resumed on another number of trainer ranks goes on as if nothing had happened, up to the order of sums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import verst
from verst.errors import ConfigError
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("one_ray"),
]

STEPS, STOP = 5, 3


def config(directory: Path, name: str, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(directory), "steps": steps},
        "model": {"path": str(directory / "model")},
        "data": {"task": "chain_sum", "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 2, "lr": 1e-3, "ranks": 2, "microbatch_tokens": 256},
        "checkpoint": {"every_steps": 2, "keep": 3},
    }


def largest_difference(run: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def losses(result: verst.RunResult) -> list[float]:
    return [row["loss/total"] for row in result.rows if row["kind"] == "step"]


def test_from_two_ranks_to_one_and_back(tmp_path: Path):
    tiny_model(tmp_path / "model")
    told: list[str] = []
    whole = verst.train(config(tmp_path, "whole", STEPS), echo=told.append)
    cut = verst.train(config(tmp_path, "cut", STOP), echo=told.append)
    stopped = load_file(cut.model / "model.safetensors")
    # as a crash before the last checkpoint: step 3 is committed and has to be trained again, now on one rank
    shutil.rmtree(cut.path / "checkpoints" / f"step-{STOP:08d}")
    shutil.rmtree(cut.model)
    with pytest.raises(ConfigError, match=r"train\.lr cannot be changed in a run"):
        verst.resume(cut.path, overrides=["train.lr=1", "train.ranks=1"], echo=told.append)
    told.clear()
    one = verst.resume(cut.path, overrides=["train.ranks=1", f"run.steps={STOP + 1}"], echo=told.append)
    said = "\n".join(told)
    assert "train.ranks: 2 -> 1" in said
    assert "resumed at step 2 (checkpoint): 1 journaled steps to train again" in said
    assert "train.ranks changed since: those steps will have the same weights up to rounding" in said
    assert not list((cut.path / "checkpoints").glob("*4/rank-*-of-00002.safetensors"))
    two = verst.resume(cut.path, overrides=["train.ranks=2", f"run.steps={STEPS}"], echo=told.append)
    assert losses(two) == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(one)) == STOP + 1
    assert largest_difference(cut.path, whole.path) < 2e-5
    final = load_file(two.model / "model.safetensors")
    assert max(float((final[name] - stopped[name]).abs().max()) for name in final) > 1e-4, "the resumed steps changed nothing"
    changes = json.loads((cut.path / "run.json").read_text())["changes"]
    assert [change["options"] for change in changes] == [
        {"run.steps": [3, 4], "train.ranks": [2, 1]},
        {"run.steps": [4, 5], "train.ranks": [1, 2]},
    ]
