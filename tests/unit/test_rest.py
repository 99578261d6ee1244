"""Bits that change between two steps are seen before anything is trained with them, and named. Also over ranks, with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.ranks import saved_by_ranks
from tests.unit.fsdp_cases import BATCHES, VOCABULARY, make_backend, make_config, path, same_bits, train, weights_of, write_model
from verst.config.schema import Config
from verst.errors import CorruptWeights
from verst.training import rest as module
from verst.training.distributed import init_distributed, leave_distributed
from verst.training.fsdp import FsdpBackend
from verst.training.rest import AtRest, Held, _differ, _disagreements, unique

__all__ = ["path"]  # a fixture

NORM = "model.norm.weight"
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
    **{"qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1},
}
"""A model whose router has a buffer that belongs to its weights."""


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share of the time it takes: these models are too small for it."""
    monkeypatch.setattr(module, "SHARE", 1e9)


KL = {"name": "grpo", "kl_coefficient": 0.1}


def flip(tensor: torch.Tensor, bit: int = 0) -> None:
    """Changes one bit of a tensor's last element."""
    words = tensor.detach().reshape(-1)[-1:].view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    words ^= 1 << bit


def trained(config: Config, steps: int = 2) -> FsdpBackend:
    backend = make_backend(config)
    train(backend, config, BATCHES[:steps])
    return backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bit", [0, 15])
@pytest.mark.parametrize("kind", ["weights", "model", "exp_avg", "exp_avg_sq", "reference"])
def test_a_flipped_bit_is_seen_before_the_next_step(path: str, dtype: str, bit: int, kind: str) -> None:
    backend = trained(make_config(path, model={"dtype": dtype}, algorithm=KL))
    tensors = {f"weights/{n}": p for n, p in backend._parameters.items()} | backend._optimizer.tensors()
    tensors |= {f"reference/{n}": p for n, p in backend._reference_parameters.items()}
    flip(tensors[f"{kind}/{NORM}"], bit)
    before = backend._optimizer.update
    named = f"weights/{NORM}" if kind == "model" and dtype == "float32" else f"{kind}/{NORM}"  # the same memory
    said = f"trainer rank 0: {named} changed between the last update of step 2 and step 3, while nothing may change it"
    with pytest.raises(CorruptWeights, match=said) as found:
        backend.load_batch(BATCHES[2])
    assert found.value.ranks == (0,)
    assert backend._optimizer.update == before


def test_no_checkpoint_is_made_of_changed_weights(path: str) -> None:
    backend = trained(make_config(path))
    backend.state()
    flip(backend._optimizer.tensors()[f"exp_avg/{NORM}"])
    with pytest.raises(CorruptWeights, match=f"exp_avg/{NORM} changed between the last update of step 2 and its state was copied"):
        backend.state()


def test_a_saved_buffer_counts(tmp_path: Path) -> None:
    backend = make_backend(make_config(write_model(tmp_path / "model", transformers.DeepseekV3Config(**SIZES)), train={"routes": "ignore"}))
    (name, buffer), *_ = backend._saved_buffers().items()
    flip(buffer)
    with pytest.raises(CorruptWeights, match=f"weights/{name} changed between its start and step 1"):
        backend.load_batch(BATCHES[0])


def test_what_may_happen_between_two_steps_raises_nothing(path: str) -> None:
    """Offload, reading, a restored state, an update that is skipped."""
    config = make_config(path, model={"dtype": "bfloat16"}, algorithm=KL, train={"minibatches": 2, "max_skipped_updates": 9})
    backend = make_backend(config)
    state = backend.state()
    for batch in BATCHES:
        train(backend, config, [batch])
        backend.release_memory(weights=False)
        weights_of(backend)
        backend.release_memory(weights=True)
        backend.resume_memory()
        backend.logprobs(batch.samples[0].tokens_T)
    backend.load_state(state)
    train(backend, config, BATCHES[:1])
    backend.load_batch(BATCHES[1])
    for update in range(backend.num_updates):
        backend.forward_backward(update, [float("nan")] * 8)
        assert backend.optimizer_step(update).report()["update/skipped"] == 1
    train(backend, config, BATCHES[2:])


def test_an_interrupted_step_is_no_corruption(path: str) -> None:
    """Its weights are known again after the next whole step, or once a state was restored."""
    config = make_config(path, train={"minibatches": 2})
    backend = make_backend(config)
    backend.load_batch(BATCHES[0])
    backend.forward_backward(0, [1.0] * 8)
    backend.optimizer_step(0)  # of two
    train(backend, config, BATCHES[:1])


# ---- copies, without processes


def test_the_minority_is_named() -> None:
    assert _disagreements({0: {"w": "a"}, 1: {"w": "b"}, 2: {"w": "a"}}) == {((1,), (0, 2)): ["w"]}
    assert _disagreements({0: {"w": "a"}, 1: {"w": "b"}}) == {((0, 1), ()): ["w"]}
    assert _disagreements({0: {"w": "a"}, 1: {"w": "b"}, 2: {"w": "c"}, 3: {"w": "a"}}) == {((0, 1, 2, 3), ()): ["w"]}
    assert _disagreements({0: {"w": "a", "x": "a"}, 1: {"w": "a"}, 2: {"x": "a"}}) == {}


def test_only_those_who_hold_the_same_are_compared() -> None:
    import numpy as np

    assert not _differ(np.array([[7, 1], [8, 2], [7, 1], [0, 0]]))
    assert _differ(np.array([[7, 1], [8, 2], [7, 2]]))


def test_memory_is_hashed_once() -> None:
    flat = torch.zeros(8)
    other = torch.zeros(2)
    assert list(unique({"a": flat[:4], "b": flat[4:]}, {"c": flat[2:6], "d": other}, {"e": other})) == ["a", "b", "d"]


def test_nothing_kept_is_nothing_to_compare() -> None:
    held = Held({"w": torch.zeros(4)})
    rest = AtRest(0, lambda: held)
    rest.require("step 1")
    rest.keep("its start")
    flip(held.tensors["w"])
    with pytest.raises(CorruptWeights, match="operations"):
        rest.require("step 1")
    rest.forget()
    rest.require("step 1")


def test_hashing_takes_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of no time at all is looked at every 20th time; one that is long enough each time."""
    monkeypatch.setattr(module, "SHARE", 0.01)
    steps = 0
    looked: set[int] = set()

    def held() -> Held:
        looked.add(steps)
        return Held({"w": torch.zeros(100)})

    rest = AtRest(0, held)
    while steps < 60:
        rest.keep("the last update")
        rest.require("the next step")
        steps += 1
    assert sorted(looked) == [0, 1, 21, 41]
    monkeypatch.setattr(module, "SHARE", 1e9)
    while steps < 100:
        rest.keep("the last update")
        rest.require("the next step")
        steps += 1
    assert sorted(looked)[4:] == list(range(61, 100))


# ---- two ranks


def corrupt(config: Config, rank: int, bad: int, kind: str) -> dict[str, Any]:
    backend = make_backend(config, rank, 2)
    train(backend, config, BATCHES[:1])
    backend.release_memory(weights=True)
    backend.resume_memory()
    train(backend, config, BATCHES[1:2])
    if rank == bad:
        tensors = backend._optimizer.tensors()
        flip(tensors[f"{kind}/model.embed_tokens.weight"])
    before = {name: tensor.clone() for name, tensor in backend._optimizer.tensors().items()}
    with pytest.raises(CorruptWeights) as found:
        backend.load_batch(BATCHES[2])
    unchanged = same_bits(before, backend._optimizer.tensors())
    return {"said": str(found.value), "ranks": found.value.ranks, "unchanged": unchanged}


def run_rank(rank: int, directory: str, address: str, path: str) -> None:
    torch.set_num_threads(1)
    module.SHARE = 1e9
    init_distributed(rank, 2, address, timeout_s=60)
    config = make_config(path)
    results = {(bad, kind): corrupt(config, rank, bad, kind) for bad in (0, 1) for kind in ("model", "exp_avg_sq")}
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


@pytest.mark.slow
def test_every_rank_names_the_rank_whose_shard_changed(path: str, tmp_path: Path) -> None:
    results = saved_by_ranks(run_rank, tmp_path, path)
    assert results[0] == results[1], "ranks disagree about what happened"
    for (bad, kind), found in results[0].items():
        name = "weights/model.embed_tokens.weight" if kind == "model" else f"{kind}/model.embed_tokens.weight"
        assert found["said"].startswith(f"trainer rank {bad}: {name} changed between the last update of step 2 and step 3,")
        assert found["ranks"] == (bad,)
        assert found["unchanged"]
