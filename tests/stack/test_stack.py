"""The whole loop with the production pair on a CPU: Ray, an SGLang server, Megatron-Core ranks over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import verst
from verst.testing import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]  # Ray warns of sockets of its own


def mixture(directory: Path) -> Path:
    """A random Qwen3-MoE of two layers with four experts."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,  # pyright: ignore[reportCallIssue] - it is one of the kwargs
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("make", "layout", "transport"),
    [
        pytest.param(tiny_model, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "group", id="dense-tp2-group"),
        pytest.param(mixture, {"pipeline_model_parallel_size": 2}, "shared", id="moe-pp2-shared"),
    ],
)
def test_sglang_generates_and_megatron_trains(tmp_path: Path, make: Callable[[Path], Path], layout: dict[str, Any], transport: str):
    config = {
        "run": {"dir": str(tmp_path), "steps": 3},
        "model": {"path": str(make(tmp_path / "model"))},
        "data": {"task": "chain_sum", "max_prompt_tokens": 128},
        "rollout": {"engine": "sglang", "group_size": 4, "max_new_tokens": 8, "max_running": 16},
        "reward": {"function": "tests.loop.rewards:spread"},
        "weights": {"transport": transport},
        "train": {"backend": "megatron", "megatron": layout, "ranks": 2, "groups_per_step": 4, "lr": 1e-3, "microbatch_tokens": 256},
    }
    result = verst.train(config, echo=lambda line: None)
    rows = [row for row in result.rows if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["update/grad_norm"] > 0 for row in rows)
    assert max(row["mismatch/probe"] for row in rows) < 1e-5
    assert max(row["mismatch/abs_max"] for row in rows) < 1e-5
    assert (
        rows[-1]["engine/server_generated_tokens"] >= 2 * 16
    )  # what SGLang counts: three steps of 16 completions, the last report after two
    assert rows[-1]["rollout/failed"] == 0
    replayed = {1.0} if make is mixture else {None}  # the experts that SGLang recorded, read at Megatron's dispatcher
    assert {row.get("routes/replayed") for row in rows} == replayed
    assert (result.model / "model.safetensors").exists()
