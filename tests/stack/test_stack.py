"""Whole runs of the production pair on a CPU, on one Ray: an SGLang server, Megatron-Core ranks over gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import verst
from tests.loop.local import local_run, prompts_file
from tests.loop.test_resume_ranks import STEPS, config, crashed, largest_difference
from tests.loop.test_run import ROWS, vowels
from verst.errors import ConfigError
from verst.journal.log import JournalReader
from verst.runtime.actors import spawn
from verst.runtime.placement import Placement
from verst.runtime.service import RunService
from verst.testing import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("one_ray"),
]

TP, PP = "train.megatron.tensor_model_parallel_size", "train.megatron.pipeline_model_parallel_size"


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
    values = {
        "run": {"dir": str(tmp_path), "steps": 3},
        "model": {"path": str(make(tmp_path / "model"))},
        "data": {"path": prompts_file(tmp_path), "max_prompt_tokens": 128},
        "rollout": {"engine": "sglang", "group_size": 4, "max_new_tokens": 8, "max_running": 16},
        "reward": {"function": "tests.loop.rewards:spread"},
        "weights": {"transport": transport},
        "train": {"backend": "megatron", "megatron": layout, "ranks": 2, "groups_per_step": 4, "lr": 1e-3, "microbatch_tokens": 256},
    }
    result = verst.train(values, echo=lambda line: None)
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


async def test_sglang_and_megatron_take_turns(tmp_path: Path):
    """On one device, for which a CPU stands, with requests in flight at hand-overs.

    The engine has all groups of the run at once and decodes one request at a time, and whichever groups it finishes first are a batch: in
    whatever order the server takes the requests, much is left when the batch is whole, for longer than a loaded machine may take to act.
    """
    model = tiny_model(tmp_path / "model")
    values = {
        "run": {"name": "turns", "dir": str(tmp_path), "steps": 6, "seed": 1},
        "rollout": {
            "engine": "sglang",
            "group_size": 2,
            "max_new_tokens": 512,
            "max_running": 1,
            "capacity_groups": 12,
            "window_groups": 12,
        },
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "train": {"backend": "megatron", "groups_per_step": 2, "lr": 1e-3, "microbatch_tokens": 1024},
        "checkpoint": {"every_steps": 2},
        "weights": {"transport": "shared"},
    }
    run = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
    await RunService(str(run.run.root), spawn, Placement(0.0, 0.0, shared=True)).run()
    steps = [row for row in run.rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert max(run.metric("mismatch/probe")) < 1e-5
    assert max(run.metric("mismatch/abs_max")) < 1e-5  # also of tokens whose keys and values were computed anew
    assert min(run.metric("time/lease_s")) > 0
    reader = JournalReader(run.run.journal)
    trajectories = [t for seq in reader.index.groups for t in reader.group(seq).trajectories]
    assert any(len(set(t.versions_T[t.loss_mask_T])) > 1 for t in trajectories), "no request was in flight at a hand-over"
    assert run.metric("rollout/failed") == [0] * 6
    assert (run.run.final / "model.safetensors").exists()


def test_a_run_resumes_on_another_layout(tmp_path: Path):
    """From tensor to pipeline parallelism, and to one rank."""
    tiny_model(tmp_path / "model")
    told: list[str] = []
    values = config(tmp_path, "whole", STEPS)
    train = values["train"] | {"backend": "megatron", "megatron": {"tensor_model_parallel_size": 2}}
    whole = verst.train(values | {"train": train}, echo=told.append)
    staged = crashed(whole.path, 2, tmp_path / "staged")
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size \(4\)"):
        verst.resume(staged, overrides=[f"{PP}=2"], echo=told.append)
    verst.resume(staged, overrides=[f"{TP}=null", f"{PP}=2"], echo=told.append)
    assert f"{PP}: None -> 2" in told
    assert 0 < largest_difference(staged, whole.path) < 2e-5
    alone = crashed(staged, 3, tmp_path / "alone")  # its checkpoint is of two stages
    verst.resume(alone, overrides=[f"{PP}=null", "train.ranks=1"], echo=told.append)
    assert 0 < largest_difference(alone, whole.path) < 2e-5


def test_a_run_of_two_megatron_ranks_is_replayed(tmp_path: Path):
    """With the routes that its engine recorded, and in two updates a step."""
    mixture(tmp_path / "model")
    values = config(tmp_path, "run", 3)
    train = values["train"] | {"backend": "megatron", "megatron": {"pipeline_model_parallel_size": 2}, "minibatches": 2}
    values |= {"train": train, "checkpoint": {"every_steps": 2}}
    run = verst.train(values, echo=lambda line: None)
    assert {row["routes/replayed"] for row in run.rows if row["kind"] == "step"} == {1.0}
    for begin in (0, 2):
        found = verst.replay(run.path, begin, echo=lambda line: None)
        assert [step.same for step in found.steps] == [True] * (3 - begin)
        assert found.largest_differences["update/grad_norm"][0] == 0.0
