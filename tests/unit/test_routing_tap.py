"""Routers of every family: found, recorded, and replayed with weights from live scores, against experts computed one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from verst.errors import InvariantViolation, ModelError
from verst.routing.tap import RoutingTap, tap_of

EXPERTS, CHOSEN, LAYERS, HIDDEN = 8, 2, 2, 32
_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NUM: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
_LOCAL: dict[str, Any] = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 4,
}
_LATENT: dict[str, Any] = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _NUM | {"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", _NUM),
    "mixtral": ("MixtralConfig", _LOCAL),
    "gpt_oss": ("GptOssConfig", _LOCAL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "minimax_m2": ("MiniMaxM2Config", _LOCAL | {"head_dim": 8}),
    "deepseek_v2": ("DeepseekV2Config", _GROUPED | _LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _GROUPED | _LATENT | {"norm_topk_prob": True}),
    "glm4_moe": ("Glm4MoeConfig", _GROUPED | {"head_dim": 8}),
}


@pytest.fixture(autouse=True)
def missing_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V2's group-limited choice reads an attribute that its module of transformers 5 does not set."""
    monkeypatch.setattr(DeepseekV2Moe, "num_experts", EXPERTS, raising=False)


def make(family: str) -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**(_BASE | options))).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))):
            tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model


def tapped(model: Any) -> RoutingTap:
    tap = tap_of(model, model.config.to_dict())
    assert tap is not None
    return tap


def random_routes(tokens: int, layers: int = LAYERS) -> torch.Tensor:
    """[N, L, K] experts that differ, which no router would have chosen."""
    rng = np.random.default_rng(8)
    return torch.from_numpy(np.argsort(rng.random((tokens, layers, EXPERTS)), axis=-1)[..., :CHOSEN].astype(np.uint8))


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def router_parameters(block: Any) -> list[nn.Parameter]:
    return list((block.router if hasattr(block, "router") else block.gate).parameters())


# ---- the families by hand: no code of transformers


def scores_by_hand(family: str, block: Any, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, E] scores that decide, and scores that become weights, after the families' papers and model cards."""
    router = block.router if family == "gpt_oss" else block.gate
    logits = hidden_NH @ router.weight.T
    if family == "gpt_oss":
        return logits + router.bias, logits + router.bias
    if family in ("qwen3_moe", "olmoe", "mixtral"):
        shares = torch.exp(logits - logits.max(-1, keepdim=True).values)
        shares = shares / shares.sum(-1, keepdim=True)
        return shares, shares
    if family == "minimax_m2":
        gates = 1 / (1 + torch.exp(-logits))
        return gates + block.e_score_correction_bias, gates
    gates = torch.softmax(logits, -1) if family == "deepseek_v2" else 1 / (1 + torch.exp(-logits))
    deciding = gates.clone() if family == "deepseek_v2" else gates + router.e_score_correction_bias
    groups = deciding.detach().view(len(logits), 4, EXPERTS // 4)
    best = groups.amax(-1) if family == "deepseek_v2" else groups.sort(-1, descending=True).values[..., :2].sum(-1)
    for token, order in enumerate(best.argsort(-1, descending=True).tolist()):
        for group in order[2:]:
            deciding[token, group * 2 : group * 2 + 2] = -torch.inf
    return deciding, gates


def weights_by_hand(family: str, weighing_K: torch.Tensor) -> torch.Tensor:
    if family == "gpt_oss":
        return torch.exp(weighing_K) / torch.exp(weighing_K).sum()
    if family == "deepseek_v2":
        return weighing_K * 2.5
    if family == "olmoe":
        return weighing_K
    return weighing_K / weighing_K.sum() * (2.5 if family in ("deepseek_v3", "glm4_moe") else 1.0)


def expert_by_hand(family: str, block: Any, expert: int, hidden_H: torch.Tensor) -> torch.Tensor:
    experts = block.experts
    if family == "gpt_oss":
        both = hidden_H @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate / (1 + torch.exp(-1.702 * gate))) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    gate, up = (experts.gate_up_proj[expert] @ hidden_H).chunk(2)
    return experts.down_proj[expert] @ (gate / (1 + torch.exp(-gate)) * up)


def block_by_hand(family: str, block: Any, hidden_NH: torch.Tensor, chosen_NK: torch.Tensor) -> torch.Tensor:
    """Every token through its experts, one after the other."""
    _, weighing_NE = scores_by_hand(family, block, hidden_NH)
    rows = []
    for token, experts in enumerate(chosen_NK.tolist()):
        weights_K = weights_by_hand(family, weighing_NE[token, experts])
        rows.append(sum(w * expert_by_hand(family, block, e, hidden_NH[token]) for w, e in zip(weights_K, experts, strict=True)))
    routed = torch.stack(rows)
    return routed + block.shared_experts(hidden_NH) if hasattr(block, "shared_experts") else routed


# ---- what is recorded


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_recorded_experts_are_those_that_the_scores_say(family: str):
    model = make(family)
    tap = tapped(model)
    inputs: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda block, args: inputs.append(args[0].flatten(0, 1))) for block in blocks(model)]
    tokens = torch.arange(2 * 9).view(2, 9)
    with tap.recording() as choices:
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = [
        scores_by_hand(family, block, hidden)[0].topk(CHOSEN).indices.sort(-1).values
        for block, hidden in zip(blocks(model), inputs, strict=True)
    ]
    assert torch.equal(choices.live().sort(-1).values, torch.stack(expected, 1))
    assert torch.equal(choices.used(), choices.live())


# ---- what is replayed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_computes_the_recorded_experts_with_live_weights(family: str):
    model = make(family)
    tap = tapped(model)
    block = blocks(model)[1]
    hidden_NH, back_NH = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.5
    routes = random_routes(12)
    found, gradients = [], []
    for by_hand in (False, True):
        model.zero_grad()
        if by_hand:
            output = block_by_hand(family, block, hidden_NH, routes[:, 1])
        else:
            with tap.replaying(routes) as choices:
                output = block(hidden_NH[None])
                output = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
            assert choices.used_of[1].tolist() == routes[:, 1].tolist()  # pyright: ignore[reportOptionalMemberAccess]
        (output * back_NH).sum().backward()
        found.append(output.detach())
        gradients.append([p.grad.clone() for p in router_parameters(block)])  # pyright: ignore[reportOptionalMemberAccess]
    scale = float(found[1].abs().max())
    torch.testing.assert_close(found[0], found[1], atol=1e-6 * max(scale, 1.0), rtol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        assert float(theirs.abs().max()) > 1e-3  # the router learns
        torch.testing.assert_close(ours, theirs, atol=1e-6 * max(float(theirs.abs().max()), 1.0), rtol=1e-5)
    live_NK = scores_by_hand(family, block, hidden_NH)[0].topk(CHOSEN).indices
    assert (live_NK.sort(-1).values != routes[:, 1].sort(-1).values).any(-1).float().mean() > 0.5  # so it was no trivial record


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_its_own_routes_changes_no_bit(family: str):
    model = make(family)
    tap = tapped(model)
    tokens = torch.arange(2 * 9).view(2, 9)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with tap.recording() as choices:
        plain = run()
    with tap.replaying(choices.live().to(torch.int16)) as replayed:
        again = run()
    assert torch.equal(replayed.used(), choices.live())
    assert len(plain) == len(again) > 10
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@torch.no_grad()
def test_tokens_without_a_record_choose_for_themselves():
    model = make("qwen3_moe")
    tap = tapped(model)
    tokens = torch.arange(12)[None]
    free = torch.arange(12) >= 7
    with tap.replaying(random_routes(12), free) as choices:
        model(input_ids=tokens, use_cache=False)
    assert torch.equal(choices.used()[free], choices.live()[free])
    assert choices.used()[~free].tolist() == random_routes(12)[~free].tolist()


@torch.no_grad()
def test_other_routes_give_other_logits_and_no_replay_goes_on_afterwards():
    model = make("qwen3_moe")
    plain = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    tap = tapped(model)
    with tap.replaying(random_routes(12)):
        other = model(input_ids=torch.arange(12)[None], use_cache=False).logits
    assert (other - plain).abs().max() > 0.01
    assert torch.equal(model(input_ids=torch.arange(12)[None], use_cache=False).logits, plain)


# ---- what is refused


def test_models_that_cannot_be_followed_are_refused():
    options = _BASE | _LOCAL
    model = transformers.AutoModelForCausalLM.from_config(transformers.PhimoeConfig(**options)).eval()  # chooses by two maxima
    with pytest.raises(ModelError, match=r"PhimoeForCausalLM.*2 layers that choose 2 of 8 experts.* 0 such choices.*train\.routes=ignore"):
        tapped(model)
    config = make("qwen3_moe").config.to_dict()
    with pytest.raises(ModelError, match="3 layers that choose 2 of 8 experts, but in a trial 2 such"):
        tap_of(make("qwen3_moe"), config | {"num_hidden_layers": 3})


def test_a_dense_model_has_no_tap():
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**_BASE, head_dim=8))
    assert tap_of(model, model.config.to_dict()) is None


@torch.no_grad()
def test_rows_of_another_pass_are_never_used():
    model = make("olmoe")
    tap = tapped(model)
    with pytest.raises(InvariantViolation, match="a pass over 5 tokens is to replay those of 4"), tap.replaying(random_routes(4)):
        model(input_ids=torch.arange(5)[None], use_cache=False)
    with pytest.raises(InvariantViolation, match="before the last one had ended"), tap.recording(), tap.recording():
        pass
    with tap.recording() as choices:
        blocks(model)[0](torch.randn(1, 3, HIDDEN))
    with pytest.raises(InvariantViolation, match="only 1 of 2 layers"):
        choices.live()
