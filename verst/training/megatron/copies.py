"""What a rank holds of the model, by names for a person, and which of it other ranks hold too (`verst.training.rest`)."""

from __future__ import annotations

import torch

from verst.training.megatron.optimizer import MegatronAdamW
from verst.training.megatron.tensors import Key, ModelTensors

_SPLIT, _WHOLE, _EXPERT = range(3)
"""Kinds of copies: data-parallel ranks hold the same part; tensor-parallel ranks hold all of it too; experts have groups of their own."""


def names_of(tensors: ModelTensors, kind: str) -> dict[str, torch.Tensor]:
    """`KIND/NAME` and this rank's part of each of the model's tensors."""
    return {f"{kind}/{_name(key)}": tensor for key, tensor in tensors.local.items()}


def updated(optimizer: MegatronAdamW, tensors: ModelTensors) -> dict[str, torch.Tensor]:
    """What `optimizer.tensors` has, with the names of the model's tensors in place of the optimizer's own."""
    names = {own: _name(tensors.place(parameter)[0]) for own, parameter, _ in optimizer.parameters()}
    return {f"{kind}/{names[own]}": tensor for key, tensor in optimizer.tensors().items() for kind, own in [key.split("/", 1)]}


def copies_of(tensors: ModelTensors, kind: str) -> dict[str, tuple[int, str]]:
    """See `verst.training.rest.Held`: the places of `names_of`."""
    found: dict[str, tuple[int, str]] = {}
    for key in tensors.local:
        rank, ranks = tensors.part(key)
        name = f"{kind}/{_name(key)}"
        sort = _EXPERT if key[2] >= 0 else _WHOLE if ranks == 1 else _SPLIT
        found[name] = sort, name if ranks == 1 else f"{name} (part {rank} of {ranks})"
    return found


def _name(key: Key) -> str:
    row, layer, expert = key
    return row.format(layer=layer, expert=expert)
