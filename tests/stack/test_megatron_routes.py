"""Routing replay in the megatron backend, one process: against experts summed by hand, and what is replayed when.

Every parallel layout under replay is in `test_megatron_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.stack.megatron_cases import delivered, make_megatron, save_model, with_routes
from tests.unit.fsdp_cases import advantages_of, largest_difference, make_batch, make_config, same_bits, train, weights_of
from verst.config.schema import Config
from verst.errors import ConfigError, ModelError, RoutesRefused
from verst.routing.records import routes_of
from verst.training.distributed import leave_distributed
from verst.training.megatron.backend import MegatronBackend
from verst.types import NO_VERSION, Batch, RoutesWanted

FAMILIES = ("qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("models")
    yield {family: save_model(directory / family, family) for family in (*FAMILIES, "qwen3")}
    leave_distributed()


def routed_batch(backend: MegatronBackend, step: int = 1) -> Batch:
    assert backend.routed_experts is not None
    return with_routes(make_batch(step), backend.routed_experts)


def config_for(path: str, **train_options: Any) -> Config:
    return make_config(path, train={"lr": 1e-3, **train_options})


# ---- by hand


def mix_by_hand(block: Any, hidden_T: torch.Tensor, experts_TK: np.ndarray, config: Any) -> torch.Tensor:
    """The layer's output, token by token and expert by expert, from its weights. Families differ in how scores become weights."""
    rows = []
    for x, chosen in zip(hidden_T, experts_TK.tolist(), strict=True):
        logits = block.gate.weight[chosen] @ x
        if config.model_type == "deepseek_v3":
            scores = torch.sigmoid(logits)
            weights = config.routed_scaling_factor * scores / scores.sum()
        else:
            weights = logits.exp() / logits.exp().sum()
        total = torch.zeros_like(x)
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ x).chunk(2)
            total = total + weight * (block.experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def replay_by_hand(model: Any, experts_TLK: np.ndarray) -> None:
    """Makes a transformers model take these experts for its next sequence."""
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]

    def of_layer(block: Any, place: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            mixed = mix_by_hand(block, hidden[0], experts_TLK[:, place], model.config)[None]
            return mixed + block.shared_experts(hidden) if hasattr(block, "shared_experts") else mixed

        return forward

    for place, block in enumerate(blocks):
        block.forward = of_layer(block, place)


def logprobs_by_hand(model: Any, batch: Batch, temperature: float) -> dict[int, torch.Tensor]:
    """Of the loss tokens of each sample, under its routes."""
    found = {}
    for index, sample in enumerate(batch.samples):
        assert sample.routes is not None
        replay_by_hand(model, sample.routes.experts_TLK)
        tokens_T = torch.from_numpy(sample.tokens_T.astype(np.int64))
        logs = (model(input_ids=tokens_T[None, :-1]).logits[0] / temperature).log_softmax(dim=-1)
        found[index] = logs.gather(1, tokens_T[1:, None])[:, 0][torch.from_numpy(sample.loss_mask_T[1:])]
    return found


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_router_gradients_are_those_of_experts_summed_by_hand(
    paths: dict[str, str], family: str, options: dict[str, Any]
) -> None:
    config = config_for(paths[family], epochs=2, **options)  # two updates, so the batch is scored first
    backend = make_megatron(config)
    batch, temperature = routed_batch(backend), config.rollout.temperature
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[family], attn_implementation="sdpa").eval()
    advantages = advantages_of(config, batch, {})
    scores = backend.load_batch(delivered(batch, backend, config))
    step = backend._step
    assert step is not None
    expected = logprobs_by_hand(model, batch, temperature)
    for index, logprobs_N in expected.items():
        assert np.abs(step.old[index] - logprobs_N.detach().numpy()).max() < 1e-5
    assert scores.tally.report()["routes/replayed"] == 1.0

    # At a ratio of 1 the clipped loss of a token is its share of the update times −advantage, to be differentiated by its log-probability.
    weights = step.weights(0)
    loss = -sum((torch.from_numpy(weights[i]) * advantages[i] * logprobs_N).sum() for i, logprobs_N in expected.items())
    torch.as_tensor(loss).backward()
    backend.forward_backward(0, advantages)
    routers = [layer.mlp.gate.weight.grad for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    ours = [layer.mlp.router.weight.main_grad for layer in backend._chunks[0].module.decoder.layers if hasattr(layer.mlp, "router")]
    assert len(ours) == len(routers) == 3
    for own, by_hand in zip(ours, routers, strict=True):
        assert by_hand.abs().max() > 1e-3
        assert (own - by_hand).abs().max() < 1e-5


# ---- what is replayed, and what is told


def test_routes_of_the_token_before_give_another_gradient(paths: dict[str, str]) -> None:
    config = make_config(paths["qwen3_moe"], train={"lr": 1e-3}, algorithm={"name": "grpo", "old_logprobs": "behaviour"})
    backend = make_megatron(config)
    batch = routed_batch(backend)
    assert all(sample.routes is not None for sample in batch.samples)
    shifted = [
        replace(s, routes=routes_of(s.tokens_T, np.roll(s.routes.experts_TLK, 1, axis=0))) for s in batch.samples if s.routes is not None
    ]
    reports = [train(backend, config, [given])[0].report() for given in (batch, replace(batch, samples=tuple(shifted)))]
    assert abs(reports[0]["loss/total"] - reports[1]["loss/total"]) > 1e-3


@pytest.mark.parametrize("selected", [{"recompute_granularity": "selective", "recompute_modules": ["moe"]}, {
    "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}], ids=["experts", "two layers"])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_in_part_train_the_same_bits(paths: dict[str, str], family: str, selected: Mapping[str, Any]) -> None:
    config, results = config_for(paths[family], epochs=2), []
    for arguments in ({}, selected):
        backend = make_megatron(config, **arguments)
        reports = [t.report() for t in train(backend, config, [routed_batch(backend, step) for step in (1, 2)])]
        results.append((reports, weights_of(backend)))
    assert results[0][0] == results[1][0]
    assert same_bits(results[0][1], results[1][1])


def own_routes(backend: MegatronBackend, config: Config, batch: Batch) -> Batch:
    """The batch with the routes that the backend's own routers choose, read at its routers' outputs, one sample at a time."""
    routers = [layer.mlp.router for layer in backend._chunks[0].module.decoder.layers if hasattr(layer.mlp, "router")]
    samples = []
    for sample in batch.samples:
        seen: list[np.ndarray] = []
        hooks = [
            router.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[1].nonzero()[:, 1].numpy())) for router in routers
        ]
        backend.logprobs(sample.tokens_T)
        for hook in hooks:
            hook.remove()
        ids = np.stack([rows.reshape(-1, 2)[: len(sample.tokens_T) - 1] for rows in seen], axis=1).astype(np.uint8)
        samples.append(replace(sample, routes=routes_of(sample.tokens_T, ids)))
    return replace(batch, samples=tuple(samples))


@pytest.mark.parametrize("family", FAMILIES)
def test_own_routes_change_nothing_and_a_perturbed_router_is_noticed(paths: dict[str, str], family: str) -> None:
    replayed, recorded, off = (config_for(paths[family], routes=routes) for routes in ("replay", "record", "ignore"))
    backend = make_megatron(replayed)
    batch = own_routes(backend, replayed, make_batch(1))
    told = train(backend, replayed, [batch])[0].report()
    assert (told["routes/replayed"], told["routes/differ"]) == (1.0, 0.0)
    assert told["routes/bytes_per_token"] == 6.0  # 3 layers of 2 experts, a byte each
    free = make_megatron(off)
    assert off.train.routes == "ignore"
    assert free.routes_wanted is None
    silent = train(free, off, [batch])[0].report()
    assert not any(name.startswith("routes/") for name in silent)
    assert largest_difference(weights_of(backend), weights_of(free)) < 1e-5  # the order of a token's experts is another one

    found = []
    for config in (replayed, recorded):
        backend = make_megatron(config)
        for layer in backend._chunks[0].module.decoder.layers:
            if hasattr(layer.mlp, "router"):
                noise = torch.randn(layer.mlp.router.weight.shape, generator=torch.Generator().manual_seed(9))
                layer.mlp.router.weight.data += 0.3 * noise
        backend._rest.forget()  # as if the update before had made it so
        found.append(train(backend, config, [batch])[0].report())
    assert found[0]["routes/replayed"] == 1.0
    assert found[0]["routes/differ"] > 0.1
    assert 0.0 < found[1]["routes/replayed"] < 0.9
    assert found[1]["routes/replayed"] == pytest.approx(1 - found[1]["routes/differ"])


def test_neither_reference_nor_probe_replay(paths: dict[str, str]) -> None:
    config = make_config(paths["qwen3_moe"], train={"lr": 1e-3}, algorithm={"name": "grpo", "kl_coefficient": 0.1})
    backend = make_megatron(config)
    tokens_T, batch = make_batch(1).samples[0].tokens_T, routed_batch(backend)
    before = backend.logprobs(tokens_T)
    free = make_megatron(make_config(paths["qwen3_moe"], train={"routes": "ignore"}, algorithm={"name": "grpo", "kl_coefficient": 0.1}))
    free.load_batch(make_batch(1))
    backend.load_batch(batch)
    assert free._step is not None
    assert backend._step is not None
    assert all((backend._step.reference[i] == logprobs).all() for i, logprobs in free._step.reference.items())
    backend.forward_backward(0, advantages_of(config, batch, {}))
    assert (backend.logprobs(tokens_T) == before).all()
    assert backend._reference is not None
    assert all(layer.mlp.router.router_replay is None for layer in backend._reference[0].decoder.layers if hasattr(layer.mlp, "router"))


def test_a_sequence_without_routes_goes_where_the_live_router_sends_it(paths: dict[str, str]) -> None:
    """A demonstration among sampled sequences, in one microbatch with them: its tokens have no record."""
    config = config_for(paths["qwen3_moe"], epochs=2, microbatch_tokens=100)
    backend = make_megatron(config)
    batch = routed_batch(backend)
    shown = replace(batch.samples[0], routes=None, versions_T=np.full_like(batch.samples[0].versions_T, NO_VERSION))
    mixed = replace(batch, samples=(shown, *batch.samples[1:]))
    free = make_megatron(config_for(paths["qwen3_moe"], epochs=2, microbatch_tokens=100, routes="ignore"))
    old = []
    for trainer, given in ((backend, mixed), (backend, batch), (free, batch)):
        tally = trainer.load_batch(given).tally
        assert trainer._step is not None
        old.append(trainer._step.old)
        if given is mixed:
            assert tally.report()["routes/replayed"] == 1.0
            assert tally.weights["routes/replayed"] == 3 * sum(len(s.tokens_T) - 1 for s in batch.samples[1:])
    assert np.abs(old[0][0] - old[2][0]).max() < 1e-5
    assert np.abs(old[0][0] - old[1][0]).max() > 1e-3
    assert all(np.abs(old[0][i] - old[1][i]).max() < 1e-5 for i in range(1, len(batch.samples)))


def test_what_a_rank_wants_and_a_dense_model_does_not(paths: dict[str, str]) -> None:
    backend = make_megatron(config_for(paths["qwen3_moe"]))
    assert backend.routes_wanted == RoutesWanted(rank=0, ranks=1, layers=(0, 1, 2), packed=True)
    dense = make_megatron(config_for(paths["qwen3"]))
    assert (dense.routed_experts, dense.routes_wanted, dense._routers) == (None, None, None)


def test_missing_and_foreign_routes_are_refused(paths: dict[str, str]) -> None:
    backend = make_megatron(config_for(paths["qwen3_moe"]))
    batch = routed_batch(backend)
    with pytest.raises(RoutesRefused, match="no routes were recorded"):
        backend.load_batch(replace(batch, samples=(replace(batch.samples[0], routes=None), *batch.samples[1:])))
    cut = [replace(s, routes=replace(s.routes, experts_TLK=s.routes.experts_TLK[:, 1:])) for s in batch.samples if s.routes is not None]
    with pytest.raises(RoutesRefused, match=r"not \[tokens, 3 layers, 2 experts\]"):
        backend.load_batch(replace(batch, samples=tuple(cut)))


def test_layers_that_config_json_does_not_name_are_refused(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from verst.training.megatron import routes

    monkeypatch.setattr(routes, "moe_layers", lambda about: (1, 2, 3))
    with pytest.raises(ModelError, match=r"says that layers \[1, 2, 3\] route, 2 of 4 experts .* Megatron built \[0, 2, 3\]"):
        make_megatron(config_for(paths["qwen3_moe"]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor: it drops tokens"),
        ({"moe_router_fusion": True}, "moe_router_fusion: it chooses experts in one kernel"),
    ],
)
def test_options_that_replay_cannot_go_with_are_named(paths: dict[str, str], arguments: dict[str, Any], reason: str) -> None:
    from verst.training.megatron.arguments import check

    with pytest.raises(ConfigError, match=f"train.megatron.{reason}.* or set train.routes=ignore"):
        check(config_for(paths["qwen3_moe"]), arguments, 1)
    assert check(config_for(paths["qwen3_moe"], routes="ignore"), arguments, 1).num_experts == 4


def test_failed_schedules_leave_no_routes_behind(paths: dict[str, str]) -> None:
    """Layers of a microbatch whose backward never came would be computed again with its routes."""
    config = config_for(paths["qwen3_moe"], gradient_checkpointing=True)
    results: list[dict[str, torch.Tensor]] = []
    for fails in (False, True):
        backend = make_megatron(config)
        batches = [routed_batch(backend, step) for step in (1, 2)]
        backend.load_batch(batches[0])
        advantages = advantages_of(config, batches[0], {})
        if fails:
            with pytest.raises(IndexError):
                backend._accumulate(backend._step, 0, advantages[:1])  # pyright: ignore[reportArgumentType]
        train(backend, config, batches)
        results.append(weights_of(backend))
    assert same_bits(results[0], results[1])
