"""Corrupted bits under Megatron-Core: masters, moments, and the copies that data- and tensor-parallel ranks hold of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import saved_by_ranks
from tests.stack.megatron_cases import make_megatron, save_model
from tests.stack.test_megatron_ranks import run_step
from tests.unit.fsdp_cases import make_batch, make_config
from tests.unit.test_rest import flip
from verst.config.schema import Config
from verst.errors import CorruptWeights
from verst.training import rest
from verst.training.distributed import init_distributed, leave_distributed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAYOUTS: Mapping[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "decoder.final_layernorm.weight"


def config_of(path: str, dtype: str = "float32") -> Config:
    return make_config(path, model={"dtype": dtype}, train={"lr": 1e-3, "microbatch_tokens": 40, "routes": "ignore"})


def said(backend: Any, spoil: Callable[[Any], None]) -> tuple[str, tuple[int, ...]]:
    """What is raised before the next step if this rank does that to its tensors after one; then they are as they were."""
    spoil(backend)
    with pytest.raises(CorruptWeights) as found:
        backend.load_batch(make_batch(9))
    spoil(backend)  # a bit that is flipped twice
    return str(found.value), found.value.ranks


def on(rank: int, bad: int, name: str, *, unseen: bool = False) -> Callable[[Any], None]:
    """Flips a bit on one rank. `unseen`: as if it had come from the update itself, so that hashes at rest stay right."""

    def spoil(backend: Any) -> None:
        if rank == bad:
            flip(backend._held().tensors[name])
            if unseen:
                backend._rest.keep("the last update of step 2")

    return spoil


def run_layout(config: Config, arguments: Mapping[str, Any], rank: int) -> Any:
    backend = make_megatron(config, rank, 2, **arguments)
    for step in (1, 2):
        run_step(backend, config, make_batch(step))
        for _ in backend.weights():
            pass
        backend.release_memory(weights=True)
        backend.resume_memory()
    return backend


def run_rank(rank: int, directory: str, address: str, paths: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    rest.SHARE = 1e9  # every step: these models are too small for it
    init_distributed(rank, 2, address, timeout_s=60)
    results: dict[str, Any] = {}
    for layout, arguments in LAYOUTS.items():
        for dtype in ("float32", "bfloat16"):
            config = config_of(paths["qwen3_moe" if layout == "ep2" else "qwen3"], dtype)
            backend = run_layout(config, arguments, rank)
            name = f"{layout} {dtype}"
            results[f"{name}: at rest"] = said(backend, on(rank, 1, f"weights/{QKV}"))
            results[f"{name}: copy"] = said(backend, on(rank, 0, f"weights/{NORM}", unseen=True))
            own = sorted(key for key in backend._held().tensors if key.startswith("exp_avg/"))[0]
            results[f"{name}: moment"] = said(backend, on(rank, 0, own))
            run_step(backend, config, make_batch(3))
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("rest")
    paths = {family: save_model(directory / family, family) for family in ("qwen3", "qwen3_moe")}
    return saved_by_ranks(run_rank, directory, paths, limit_s=240)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_and_tensor_are_named_on_every_rank(results: list[dict[str, Any]], layout: str, dtype: str) -> None:
    for rank in results:
        told, ranks = rank[f"{layout} {dtype}: at rest"]
        assert told.startswith(f"trainer rank 1: weights/{QKV} changed between the last update of step 2 and step 9,")
        assert ranks == (1,)
        told, ranks = rank[f"{layout} {dtype}: moment"]
        assert told.startswith("trainer rank 0: exp_avg/")
        assert ranks == (0,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_that_differ_are_seen_though_nothing_changed_at_rest(results: list[dict[str, Any]], layout: str, dtype: str) -> None:
    for rank in results:
        told, ranks = rank[f"{layout} {dtype}: copy"]
        assert told.startswith(f"one of trainer ranks 0, 1: their copies of weights/{NORM} differ before step 9")
        assert ranks == (0, 1)


def test_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "SHARE", 1e9)
    config = config_of(save_model(tmp_path / "model"), "bfloat16")
    backend = make_megatron(config)
    for step in (1, 2):
        run_step(backend, config, make_batch(step))
    held = backend._held().tensors
    assert {name.partition("/")[0] for name in held} == {"weights", "model", "exp_avg", "exp_avg_sq"}
    for kind in ("weights", "model", "exp_avg", "exp_avg_sq"):
        name = f"{kind}/{QKV}"
        told, _ = said(backend, lambda _, name=name: flip(held[name]))
        assert told.startswith(f"trainer rank 0: {name} changed between")
        backend._rest.keep("the last update of step 2")
    leave_distributed()
