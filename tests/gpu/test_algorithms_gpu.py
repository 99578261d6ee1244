"""Whole runs on a GPU of what brings more than a policy: a critic, pairs of answers, a teacher. Through `verst.train` under Ray."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import verst
from tests.gpu.test_run_gpu import letters
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers, the compiler and Ray
    pytest.mark.timeout(500),
]
needs_stack = pytest.mark.skipif(find_spec("sglang") is None or find_spec("megatron") is None, reason="needs SGLang and Megatron-Core")
KERNELS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_prefill_cuda_graph": True,
    "cuda_graph_bs_decode": [1, 8, 64],
    "max_total_tokens": 65536,  # with as many as a small model has room for, its other buffers have none
}
"""Those of SGLang that need no more than triton, for a start in seconds."""
EMBEDDED = {"dtype": "float32", "rollout": {}, "train": {}}
PRODUCTION = {"dtype": "bfloat16", "rollout": {"engine": "sglang", "sglang": KERNELS}, "train": {"backend": "megatron"}}
PAIR = [pytest.param(EMBEDDED, id="embedded"), pytest.param(PRODUCTION, id="production", marks=needs_stack)]


def run_of(directory: Path, algorithm: dict[str, Any], pair: dict[str, Any], **changes: Any) -> Any:
    """A run of ten steps on 64 prompts, which may have a better and a worse answer each."""
    config = {
        "run": {"dir": str(directory), "steps": 10},
        "model": {"path": str(tiny_model(directory / "model", hidden_size=64)), "dtype": pair["dtype"]},
        "data": {"max_prompt_tokens": 64, **changes.pop("data", {})},
        "algorithm": algorithm,
        "rollout": {"max_new_tokens": 16, "max_running": 64} | changes.pop("rollout", {"group_size": 8}) | pair["rollout"],
        "train": {"groups_per_step": 8, "lr": 1e-2} | pair["train"],
    }
    rows = [{"prompt": f"count {i}", "chosen": "aaaa", "rejected": "zzzz"} for i in range(64)]
    return verst.train(config, prompts=rows, echo=[].append, **changes)


def column(result: Any, name: str) -> list[float]:
    return [row[name] for row in result.rows if row["kind"] == "step"]


def bits(result: Any) -> bytes:
    return (result.model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("pair", PAIR)
def test_ppo_learns_what_tokens_are_worth(tmp_path: Path, pair: dict[str, Any]) -> None:
    ppo = {"name": "ppo", "critic_lr": 3e-3, "kl_coefficient": 0.05}
    result = run_of(tmp_path / "a", ppo, pair, reward=letters)
    values = column(result, "critic/value")
    assert values[0] == 0  # its head begins with zeros
    assert abs(values[-1] - np.mean(column(result, "reward"))) < 1
    assert np.isfinite(column(result, "critic/loss")).all()
    assert min(column(result, "update/grad_norm")) > 0
    if "engine" not in pair["rollout"]:
        assert bits(run_of(tmp_path / "b", ppo, pair, reward=letters)) == bits(result)


@pytest.mark.parametrize("pair", PAIR)
def test_dpo_learns_to_prefer_the_better_of_given_pairs(tmp_path: Path, pair: dict[str, Any]) -> None:
    given = {"columns": {"chosen": "chosen", "rejected": "rejected"}}
    result = run_of(tmp_path, {"name": "dpo"}, pair, data=given, rollout={})
    margins = np.subtract(column(result, "policy/chosen_reward"), column(result, "policy/rejected_reward"))
    assert abs(margins[0]) < 1e-5  # at first the policy is the reference
    assert margins[-1] > margins[1] > 0


@pytest.mark.parametrize("pair", PAIR)
def test_dpo_on_answers_of_its_own(tmp_path: Path, pair: dict[str, Any]) -> None:
    result = run_of(tmp_path, {"name": "online_dpo"}, pair, reward=letters)
    margins = np.subtract(column(result, "policy/chosen_reward"), column(result, "policy/rejected_reward"))
    assert abs(margins[0]) < 1e-5
    assert np.isfinite(margins).all()
    assert min(column(result, "update/grad_norm")) > 0


@pytest.mark.parametrize("pair", PAIR)
def test_a_student_comes_closer_to_the_teacher_beside_its_engine(tmp_path: Path, pair: dict[str, Any]) -> None:
    teacher = tiny_model(tmp_path / "teacher", hidden_size=64, seed=7, initializer_range=0.15)
    result = run_of(tmp_path / "run", {"name": "distill", "teacher": str(teacher)}, pair)
    divergence = column(result, "policy/teacher_kl")
    assert np.mean(divergence[-3:]) < 0.9 * np.mean(divergence[:3])  # 3,000 tokens each
