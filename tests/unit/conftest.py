"""One real run, made once in this process: what commands read of runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.local import LocalRun, local_run
from verst.testing import tiny_model


def last_letters(trajectory: Any, fields: Any) -> float:
    """0 to 4 by the completion's letters; cannot say for prompts whose answer is 3."""
    if fields["answer"] == "3":
        raise ValueError("nobody knows")
    return float(sum(map(ord, trajectory.completion)) % 5)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 different prompts, of which a ninth has the answer 3."""
    path = tmp_path_factory.mktemp("data") / "counting.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"count {i}", "answer": str(i % 9)}) + "\n" for i in range(64)))
    return path


@pytest.fixture(scope="session")
def done_run(tmp_path_factory: pytest.TempPathFactory, tiny: Path, prompts: Path) -> LocalRun:
    """Four steps of GRPO with checkpoints of steps 2 and 4. Read only: tests that change something copy it."""
    values = {
        "run": {"name": "done", "dir": str(tmp_path_factory.mktemp("runs")), "steps": 4, "seed": 1},
        "data": {"path": str(prompts), "holdout": 0.3, "max_prompt_tokens": 64},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "eval": {"every_steps": 2, "prompts": 4},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return asyncio.run(local_run(Path(values["run"]["dir"]), tiny, values, reward=last_letters).go())
    finally:
        torch.set_num_threads(threads)
