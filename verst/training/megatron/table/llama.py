"""Llama, SmolLM2 and other models of model_type `llama`: grouped-query attention, gated MLP, tied or untied embeddings."""

from __future__ import annotations

from typing import Any

from verst.training.megatron.table import rows


def _arguments(config: Any) -> dict[str, Any]:
    return rows.common_arguments(config) | rows.gqa_arguments(config)


def _problems(config: Any) -> list[str]:
    return rows.unsupported(config, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"})


FAMILY = rows.Family(
    name="llama",
    rows=(rows.EMBEDDING, *rows.GQA, *rows.PRE_MLP_NORM, *rows.gated_mlp("mlp.", "mlp.", "all"), rows.FINAL_NORM, rows.OUTPUT),
    arguments=_arguments,
    problems=_problems,
)
