"""Whether and how a model routes, read from its `config.json`. No torch, so that a run file can be checked anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from verst.model_spec import installed
from verst.types import RoutedExperts

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_NAMES_EXPERTS = re.compile(r"^(moe_)?(num|n)_(?!shared).*experts$|^num_experts_per|^moe_(topk|k)$")


def routed_experts(about: Mapping[str, Any]) -> RoutedExperts | None:
    """How a model with this config routes; None for a dense one, or one whose config names no number of chosen experts."""
    if (own := _by_spec(about)) is not None:
        layers_own, experts, chosen = own
        return RoutedExperts(len(layers_own), experts, chosen) if layers_own else None
    text = about.get("text_config", about)
    experts = next((int(text[name]) for name in _EXPERTS if text.get(name)), 0)
    chosen = int(text.get("num_experts_per_tok") or 0)
    layers = len(moe_layers(about)) if experts > 1 and chosen else 0
    return RoutedExperts(layers, experts, chosen) if layers else None


def unread_experts(about: Mapping[str, Any]) -> str | None:
    """The key under which a config names several experts that `routed_experts` cannot read; such a model would pass for a dense one."""
    if routed_experts(about) is not None:
        return None
    text = about.get("text_config", about)
    named = (key for key, value in text.items() if _NAMES_EXPERTS.search(key) and isinstance(value, int) and value > 1)
    return next(named, None)


def moe_layers(about: Mapping[str, Any]) -> tuple[int, ...]:
    """The decoder layers that have routed experts, in order: how families say which do not.

    Qwen skips those of `mlp_only_layers` and all but every `decoder_sparse_step`-th, DeepSeek the first `first_k_dense_replace`, GLM lists
    `mlp_layer_types`, Llama 4 `moe_layers`. In a family that says nothing, all have.
    """
    if (own := _by_spec(about)) is not None:
        return tuple(own[0])
    text = about.get("text_config", about)
    every = range(text["num_hidden_layers"])
    if text.get("moe_layers") is not None:
        return tuple(text["moe_layers"])
    if text.get("mlp_layer_types") is not None:
        return tuple(layer for layer, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse")
    dense = set(text.get("mlp_only_layers") or ()) | set(range(text.get("first_k_dense_replace") or 0))
    step = text.get("decoder_sparse_step") or 1
    return tuple(layer for layer in every if layer not in dense and (layer + 1) % step == 0)


def _by_spec(about: Mapping[str, Any]) -> tuple[Sequence[int], int, int] | None:
    spec = installed(about.get("model_type"))
    return None if spec is None else spec.moe(about)
