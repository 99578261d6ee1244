"""The `fsdp` backend on GPUs: against the CPU, against itself for bits, and two ranks over NCCL against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.unit.fsdp_cases import (
    BATCHES,
    largest_difference,
    make_backend,
    make_batch,
    make_config,
    path,
    same_bits,
    save_model,
    train,
    weights_of,
    with_routes,
)
from verst.config.schema import Config
from verst.training.distributed import Rendezvous, init_distributed, leave_distributed

__all__ = ["path"]  # a fixture

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # of drivers, NCCL and the compiler
]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2"])
def test_a_gpu_trains_as_a_cpu_does(tmp_path: Path, family: str) -> None:
    config = make_config(save_model(tmp_path, family), train={"minibatches": 2}, algorithm={"name": "grpo", "kl_coefficient": 0.1})
    results = []
    for device in ("cpu", "cuda"):
        backend = make_backend(config, device=device)
        batch = BATCHES[0] if backend.routed_experts is None else with_routes(BATCHES[0], backend.routed_experts)
        reports = [tally.report() for tally in train(backend, config, [batch])]
        results.append((weights_of(backend), reports, backend.logprobs(BATCHES[0].samples[0].tokens_T)))
    # Float32 noise of a gradient, divided by the root of a tiny second moment: see test_fsdp_backend.
    assert largest_difference(results[0][0], results[1][0]) < 2e-3
    assert results[1][1][0]["policy/entropy"] == pytest.approx(results[0][1][0]["policy/entropy"], rel=1e-4)
    assert results[1][1][0]["update/grad_norm"] == pytest.approx(results[0][1][0]["update/grad_norm"], rel=1e-3)
    np.testing.assert_allclose(results[0][2], results[1][2], atol=0.02)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"compile": True}], ids=["plain", "recompute", "compile"])
def test_a_gpu_repeats_its_bits_and_resumes_with_them(path: str, options: dict[str, Any]) -> None:
    config = make_config(path, model={"dtype": "bfloat16"}, train={"lr": 1e-3, "minibatches": 2} | options)
    first, second = make_backend(config, device="cuda"), make_backend(config, device="cuda")
    train(first, config, BATCHES[:2])
    train(second, config, BATCHES[:1])
    middle = second.state()
    train(second, config, [make_batch(8)])
    second.load_state(middle)
    train(second, config, BATCHES[1:2])
    assert same_bits(first.state().tensors, second.state().tensors)
    assert same_bits(weights_of(first), weights_of(second))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_of_experts_replay_the_same_rows(tmp_path: Path, dtype: str) -> None:
    """On a GPU the backward pass, and with it the recomputation, runs in a thread of its own."""
    path, runs = save_model(tmp_path, "qwen3_moe"), []
    for recompute in (False, True):
        config = make_config(path, model={"dtype": dtype}, run={"deterministic": True}, train={"gradient_checkpointing": recompute})
        backend = make_backend(config, device="cuda")
        assert backend.routed_experts is not None
        tallies = train(backend, config, [with_routes(batch, backend.routed_experts) for batch in BATCHES])
        assert {tally.report()["routes/replayed"] for tally in tallies} == {1.0}
        runs.append(weights_of(backend))
    assert same_bits(*runs)


def run_rank(rank: int, address: str, config: Config, directory: str) -> None:
    device = f"cuda:{rank}"
    init_distributed(rank, 2, address, timeout_s=60, device=device)
    backend = make_backend(config, rank, 2, device)
    train(backend, config, BATCHES)
    torch.save(weights_of(backend), f"{directory}/rank{rank}.pt")
    leave_distributed()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(path: str, tmp_path: Path) -> None:
    config = make_config(path, train={"minibatches": 2})
    meeting = Rendezvous()
    spawn(run_rank, (meeting.address, config, str(tmp_path)), nprocs=2)
    alone = make_backend(config, device="cuda:0")
    train(alone, config, BATCHES)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same_bits(*ranks)
    assert largest_difference(ranks[0], weights_of(alone)) < 2e-3
