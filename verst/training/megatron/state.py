"""A rank's training state: its shards of masters and moments, bit for bit, with the places in the whole model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from verst.errors import CheckpointError
from verst.protocols import BackendState
from verst.training.checkpoints import LoadedState
from verst.training.megatron.layout import Layout
from verst.training.megatron.optimizer import MegatronAdamW
from verst.training.megatron.reshard import Piece, SavedShards
from verst.training.megatron.tensors import ModelTensors
from verst.training.state import RankState, random_state, require_names, set_random_state


def capture(optimizer: MegatronAdamW, layout: Layout, tensors: ModelTensors) -> RankState:
    """Copies this rank's state to the CPU. Names are `model/…`, `exp_avg/…` and `exp_avg_sq/…` of what this rank updates."""
    copied = {name: part.detach().to("cpu", copy=True) for name, part in optimizer.tensors().items()}
    pieces = {name: piece.described() for name, piece in _pieces(optimizer, tensors).items()}
    values = {**optimizer.counters(), "rng": random_state(), "layout": _described(layout), "pieces": pieces}
    return RankState(copied, values, {})


def restore(optimizer: MegatronAdamW, state: BackendState, layout: Layout, tensors: ModelTensors) -> None:
    """Takes a state in: of the same layout, or one of any layout that comes with the files of all ranks. A collective.

    Raises `CheckpointError`, before anything is changed, if it is of another backend or model, or of another layout without files.
    """
    pieces, parts = _pieces(optimizer, tensors), optimizer.tensors()
    saved = state.values.get("layout")
    if saved == _described(layout) and state.values.get("pieces") == {name: piece.described() for name, piece in pieces.items()}:
        fitting = _own(state.tensors, parts)
    elif isinstance(state, LoadedState) and "pieces" in state.values:
        with SavedShards(state.files) as shards:
            fitting = {
                name: shards.read(tensors, name.split("/", 1)[0], pieces[name.split("/", 1)[1]], part) for name, part in parts.items()
            }
    else:
        raise CheckpointError(
            f"checkpoint: it was saved by {saved or 'another backend'}, this run has {_described(layout)}, and it does not tell where its "
            "shards belong: set train.backend, train.ranks and train.megatron as they were, or start a new run from the exported model"
        )
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(fitting[name])
    optimizer.restored(state.values)
    set_random_state(state.values["rng"])


def _own(given: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    require_names(set(parts), set(given))
    for name, part in parts.items():
        if given[name].shape != part.shape:
            raise CheckpointError(
                f"checkpoint of another model: {name} has shape {tuple(given[name].shape)} instead of {tuple(part.shape)}; "
                "set model.path to the model the checkpoint was made of"
            )
    return given


def _pieces(optimizer: MegatronAdamW, tensors: ModelTensors) -> dict[str, Piece]:
    found: dict[str, Any] = {}
    for name, parameter, begin in optimizer.parameters():
        key, rank, ranks = tensors.place(parameter)
        found[name] = Piece(key, rank, ranks, tuple(parameter.shape), begin)
    return found


def _described(layout: Layout) -> str:
    return f"{layout.world} ranks of the megatron backend ({layout})"
