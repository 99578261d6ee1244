"""A run on a GPU in deterministic bfloat16, replayed on it: the weights of each step must be the committed ones, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import verst
from tests.gpu.test_run_gpu import letters
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers, the compiler and Ray
]


def test_steps_on_a_gpu_come_out_again(tmp_path: Path) -> None:
    config = {
        "run": {"dir": str(tmp_path), "steps": 4},
        "model": {"path": str(tiny_model(tmp_path / "model", hidden_size=64)), "dtype": "bfloat16"},
        "data": {"max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16},
        "train": {"groups_per_step": 4, "lr": 1e-2, "minibatches": 2, "microbatch_tokens": 128},
        "checkpoint": {"every_steps": 2, "export_final": False},
    }
    rows = [{"prompt": f"count {i}", "answer": str(i)} for i in range(64)]
    run = verst.train(config, reward=letters, prompts=rows, echo=lambda line: None)
    for begin in (0, 2):
        # in a process of its own, as the command is: cuBLAS reads what makes it repeat its sums once, when CUDA starts
        command = [sys.executable, "-m", "verst.cli", "replay", str(run.path), "--from", str(begin), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert [step["same"] for step in found["steps"]] == [True] * (4 - begin)
        assert len({step["digest"] for step in found["steps"]}) == 4 - begin
        assert [largest["difference"] for largest in found["largest_differences"].values()] == [0.0, 0.0]
