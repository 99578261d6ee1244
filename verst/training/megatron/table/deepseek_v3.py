"""DeepSeek-V3 (arXiv 2412.19437): latent attention, leading dense layers, shared experts, sigmoid routing in groups with a bias.

The bias corrects the choice of experts only and is no parameter; it is kept as it was loaded, and so are its bits.
"""

from __future__ import annotations

from typing import Any

from verst.training.megatron.table import rows

_ATTENTION = (
    rows.layer_row("input_layernorm.weight", "input_layernorm.weight"),
    rows.layer_row("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", split="rows"),
    rows.layer_row("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", split="rows"),
    rows.layer_row(
        "self_attention.q_layernorm.weight",
        "self_attn.q_a_layernorm.weight",
        aliases=("self_attention.linear_q_up_proj.layer_norm_weight",),
    ),
    rows.layer_row("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", split="rows"),
    rows.layer_row("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", split="rows"),
    rows.layer_row(
        "self_attention.kv_layernorm.weight",
        "self_attn.kv_a_layernorm.weight",
        aliases=("self_attention.linear_kv_up_proj.layer_norm_weight",),
    ),
    rows.layer_row("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", split="rows"),
    rows.layer_row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", split="columns"),
)


def _is_moe(config: Any, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _experts(config: Any) -> int:
    return config.n_routed_experts


def _arguments(config: Any) -> dict[str, Any]:
    attention = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "kv_channels": config.v_head_dim,
    }
    experts = {
        "num_experts": _experts(config),
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_num_groups": config.n_group,
        "moe_router_group_topk": config.topk_group,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_layer_freq": [int(_is_moe(config, layer)) for layer in range(config.num_hidden_layers)],
    }
    dense = rows.common_arguments(config) | attention | _rope(config.rope_parameters)
    return dense | experts if any(experts["moe_layer_freq"]) else dense


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
    }


def _problems(config: Any) -> list[str]:
    needed = {"attention_bias": False, "hidden_act": "silu", "norm_topk_prob": True, "rope_interleave": True}
    kind = config.rope_parameters.get("rope_type", "default")
    wrong = [] if kind in ("default", "yarn") else [f"config.json has rope_type {kind!r}; DeepSeek-V3 has default or yarn"]
    return rows.unsupported(config, needed) + wrong


def _ignored(config: Any) -> tuple[str, ...]:
    """Multi-token-prediction layers lie behind the last layer and take no part in a policy's probabilities."""
    return (f"model.layers.{config.num_hidden_layers}.",)


FAMILY = rows.Family(
    name="deepseek_v3",
    rows=(
        rows.EMBEDDING,
        *_ATTENTION,
        *rows.PRE_MLP_NORM,
        *rows.gated_mlp("mlp.", "mlp.", "dense"),
        *rows.ROUTER,
        rows.layer_row("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", layers="moe"),
        *rows.gated_mlp("mlp.shared_experts.", "mlp.shared_experts.", "moe"),
        *rows.EXPERTS,
        rows.FINAL_NORM,
        rows.OUTPUT,
    ),
    arguments=_arguments,
    problems=_problems,
    is_moe=_is_moe,
    experts=_experts,
    ignored=_ignored,
)
