"""Experts whose rows do not depend on where the neighbours are routed, as a function in transformers' registry of expert computations.

Rows are sorted by expert, each expert's filled up to a multiple at which products give a row the same bits whatever the others are; a
token's results are added in the order in which its router chose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from verst.exact.rows import PRODUCT_ROWS, elements_multiple, filled

_NAME = "verst_exact"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def has_experts(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in _COUNTS)


def use_exact_experts(model: PreTrainedModel) -> None:
    """Has the model's experts, if there are any, computed here from now on."""
    if has_experts(model):
        ExpertsInterface.register(_NAME, exact_experts)
        model.set_experts_implementation(_NAME)


def exact_experts(self: Any, hidden_NH: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """[N, H], on a CPU: the weighted sum of each token's experts. `self` is transformers' module of all experts of a layer."""
    first, first_bias = _matrices(self, "gate_up_proj" if self.has_gate else "up_proj")
    second, second_bias = _matrices(self, "down_proj")
    multiple = math.lcm(PRODUCT_ROWS, elements_multiple(first[0].shape[0]))
    order = experts_NK.flatten().argsort(stable=True)
    counts = experts_NK.flatten().bincount(minlength=len(first)).tolist()
    sorted_SH = hidden_NH[order // experts_NK.shape[1]]
    results = []
    for expert, rows_H in enumerate(sorted_SH.split(counts)):
        if len(rows_H):
            inner = linear(filled(rows_H, multiple), first[expert], first_bias[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            results.append(linear(inner, second[expert], second_bias[expert])[: len(rows_H)])
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    chosen_NKH = torch.cat(results)[places].view(*experts_NK.shape, -1)
    # One after the other: a sum over an axis is vectorised across its neighbours, and rows on its ragged end would differ.
    total_NH = chosen_NKH[:, 0] * weights_NK[:, :1]
    for k in range(1, experts_NK.shape[1]):
        total_NH = total_NH + chosen_NKH[:, k] * weights_NK[:, k : k + 1]
    return total_NH.to(hidden_NH.dtype)


def _matrices(module: Any, name: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """The experts' weights as `linear` takes them, and their biases, apart: the gradients of all are put together once."""
    weights = getattr(module, name).unbind(0)
    biases = getattr(module, f"{name}_bias").unbind(0) if module.has_bias else (None,) * len(weights)
    return tuple(weight.t() for weight in weights) if module.is_transposed else weights, biases
