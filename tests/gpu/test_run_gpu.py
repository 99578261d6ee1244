"""A whole run on one GPU that trainer and engine share, through `verst.train` under Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import verst
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers, the compiler and Ray
]


def letters(trajectory: Any, fields: Any) -> float:
    """A reward that varies between the members of a group."""
    return float(sum(map(ord, trajectory.completion)) % 5)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_three_steps_on_a_gpu(tmp_path: Path, dtype: str, limit: float) -> None:
    lines: list[str] = []
    config = {
        "run": {"dir": str(tmp_path), "steps": 3},
        "model": {"path": str(tiny_model(tmp_path / "model", hidden_size=64)), "dtype": dtype},
        "data": {"max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16},
        "train": {"groups_per_step": 4, "lr": 1e-3},
    }
    rows = [{"prompt": f"count {i}", "answer": str(i)} for i in range(64)]
    result = verst.train(config, reward=letters, prompts=rows, echo=lines.append)
    steps = [row for row in result.rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert max(row["mismatch/abs_max"] for row in steps) < limit
    assert max(row["mismatch/probe"] for row in steps) < limit
    assert all(row["update/grad_norm"] > 0 for row in steps)
    assert (result.model / "model.safetensors").is_file()
    again = verst.train(config | {"run": {**config["run"], "name": "again"}}, reward=letters, prompts=rows, echo=lines.append)
    digests = [(r / "model.safetensors").read_bytes() for r in (result.model, again.model)]
    assert digests[0] == digests[1]  # run.deterministic is on by default
