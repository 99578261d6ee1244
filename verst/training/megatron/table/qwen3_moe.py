"""Qwen3 with a mixture of experts: softmax over the experts chosen, no shared expert, some layers dense if the config says so."""

from __future__ import annotations

from typing import Any

from verst.training.megatron.table import qwen3, rows


def _is_moe(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _experts(config: Any) -> int:
    return config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts


def _arguments(config: Any) -> dict[str, Any]:
    return qwen3.arguments(config) | {
        "num_experts": _experts(config),
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_layer_freq": [int(_is_moe(config, layer)) for layer in range(config.num_hidden_layers)],
    }


FAMILY = rows.Family(
    name="qwen3_moe",
    rows=(
        rows.EMBEDDING,
        *qwen3.ATTENTION,
        *rows.gated_mlp("mlp.", "mlp.", "dense"),
        *rows.ROUTER,
        *rows.EXPERTS,
        rows.FINAL_NORM,
        rows.OUTPUT,
    ),
    arguments=_arguments,
    problems=qwen3.problems,
    is_moe=_is_moe,
    experts=_experts,
)
