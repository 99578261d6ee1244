"""Qwen3, dense: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from typing import Any

from verst.training.megatron.table import rows


def arguments(config: Any) -> dict[str, Any]:
    return rows.common_arguments(config) | rows.gqa_arguments(config) | {"qk_layernorm": True}


def problems(config: Any) -> list[str]:
    return rows.unsupported(config, {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"})


ATTENTION = (*rows.GQA, *rows.QK_NORM, *rows.PRE_MLP_NORM)

FAMILY = rows.Family(
    name="qwen3",
    rows=(rows.EMBEDDING, *ATTENTION, *rows.gated_mlp("mlp.", "mlp.", "all"), rows.FINAL_NORM, rows.OUTPUT),
    arguments=arguments,
    problems=problems,
)
