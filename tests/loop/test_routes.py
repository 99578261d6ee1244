"""Whole runs of a Mixture-of-Experts model: its routes are journaled, replayed, measured, and still there after a restart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.loop.local import LocalRun, local_run
from tests.loop.test_run import ROWS, TwoTurns, digests, stopped_after, vowels
from verst.journal.log import JournalReader
from verst.routing.records import require_routes
from verst.runtime.exporting import export_run
from verst.testing import tiny_model
from verst.types import RoutedExperts, Trajectory

KIND = RoutedExperts(layers=2, experts=8, chosen=2)

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with three layers, of which the second is dense, and the tokenizer of `tiny_model`."""
    path = tiny_model(tmp_path_factory.mktemp("model") / "moe")
    dense = AutoModelForCausalLM.from_pretrained(path).config
    config = Qwen3MoeConfig(
        vocab_size=dense.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=KIND.experts,
        num_experts_per_tok=KIND.chosen,
        norm_topk_prob=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )
    (path / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def run_of(directory: Path, moe: Path, name: str = "run", *, steps: int = 3, **sections: Any) -> LocalRun:
    run = {"name": name, "dir": str(directory), "steps": steps, "seed": 1, "deterministic": True}
    return local_run(directory, moe, {"run": run} | sections, reward=vowels, prompts=ROWS)


def trajectories(run: LocalRun, step: int) -> list[Trajectory]:
    reader = JournalReader(run.run.journal)
    return [t for seq in reader.batch(step).groups for t in reader.group(seq).trajectories]


@torch.no_grad()
def own_routes(model: Any, trajectory: Trajectory) -> np.ndarray:
    tokens = torch.from_numpy(trajectory.tokens_T[None, :-1].astype(np.int64))
    scores = model.model(input_ids=tokens, output_router_logits=True).router_logits
    return np.sort(torch.stack([layer.topk(KIND.chosen).indices for layer in scores], 1).numpy(), -1)


async def test_what_was_routed_is_journaled_and_trained(tmp_path: Path, moe: Path):
    run = await run_of(tmp_path, moe).go()
    model = AutoModelForCausalLM.from_pretrained(moe)
    for trajectory in trajectories(run, 1):
        require_routes(trajectory, KIND)
        assert trajectory.routes is not None
        np.testing.assert_array_equal(np.sort(trajectory.routes.experts_TLK, -1), own_routes(model, trajectory))
    for step in (2, 3):
        for trajectory in trajectories(run, step):
            require_routes(trajectory, KIND)
    assert run.metric("routes/replayed") == [1.0, 1.0, 1.0]
    assert run.metric("routes/differ") == run.metric("routes/differ/layer_1") == run.metric("routes/differ/age_0") == [0.0, 0.0, 0.0]
    assert run.metric("routes/bytes_per_token") == [4.0, 4.0, 4.0]
    assert run.metric("mismatch/abs_max") == [0.0, 0.0, 0.0]
    final = AutoModelForCausalLM.from_pretrained(run.run.final)
    gates = [(a, b) for (n, a), b in zip(final.named_parameters(), model.parameters(), strict=True) if n.endswith("gate.weight")]
    assert len(gates) == 2
    assert all(not torch.equal(a, b) for a, b in gates)  # the routers learn
    shutil.rmtree(run.run.final)
    assert export_run(run.run.root, tmp_path / "out").source == "checkpoint"  # in which transformers keeps experts fused
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), final.parameters(), strict=True))


async def test_older_tokens_keep_their_routes_and_are_told_by_age(tmp_path: Path, moe: Path):
    rollout = {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "capacity_groups": 12}
    train = {"groups_per_step": 4, "threads": 1, "lr": 2e-2, "minibatches": 2}
    algorithm = {"name": "grpo", "old_logprobs": "behaviour"}
    run = await run_of(tmp_path, moe, steps=5, rollout=rollout, train=train, algorithm=algorithm).go()
    assert set(run.metric("routes/replayed")) == {1.0}
    assert max(run.metric("staleness/max")) >= 1
    assert run.metric("routes/differ")[0] == 0
    assert max(run.metric("routes/differ/age_1")) > 0  # the trainer's own router would choose otherwise by now


async def test_a_second_turn_adds_to_the_routes_of_the_first(tmp_path: Path, moe: Path):
    rollout = {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "max_turns": 2}
    values = {"rollout": rollout, "data": {"max_prompt_tokens": 128}, "run": {"name": "turns", "dir": str(tmp_path), "steps": 1, "seed": 1}}
    run = await local_run(tmp_path, moe, values, reward=vowels, prompts=ROWS, environment=TwoTurns).go()
    model = AutoModelForCausalLM.from_pretrained(moe)
    for trajectory in trajectories(run, 1):
        assert trajectory.routes is not None
        np.testing.assert_array_equal(np.sort(trajectory.routes.experts_TLK, -1), own_routes(model, trajectory))


@pytest.mark.slow
async def test_a_resumed_run_replays_the_journaled_routes(tmp_path: Path, moe: Path):
    """Steps after the checkpoint are trained again from the journal, and come out the same only on the same routes."""
    whole = await run_of(tmp_path, moe, "whole", steps=4, checkpoint={"every_steps": 2}).go()
    broken = run_of(tmp_path, moe, "broken", steps=4, checkpoint={"every_steps": 2})
    await stopped_after(broken, 3)
    before = [t.routes for t in trajectories(broken, 3)]
    await broken.go()
    assert "1 journaled steps to train again" in " ".join(broken.lines)
    assert digests(broken) == digests(whole)
    assert set(broken.metric("routes/replayed")) == {1.0}
    for trajectory, routes in zip(trajectories(whole, 3), before, strict=True):
        assert routes is not None
        assert trajectory.routes is not None
        np.testing.assert_array_equal(trajectory.routes.experts_TLK, routes.experts_TLK)


@pytest.mark.parametrize(("routes", "measured"), [("record", True), ("ignore", False)])
async def test_routes_can_be_compared_only_or_switched_off(tmp_path: Path, moe: Path, routes: str, measured: bool):
    run = await run_of(tmp_path, moe, steps=1, train={"groups_per_step": 4, "threads": 1, "lr": 1e-3, "routes": routes}).go()
    assert bool(run.metric("routes/differ")) is measured
    assert all((t.routes is not None) is measured for t in trajectories(run, 1))
