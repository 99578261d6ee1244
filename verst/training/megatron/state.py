"""A rank's training state on one layout: its shards of masters and moments, bit for bit."""

from __future__ import annotations

import torch

from verst.errors import CheckpointError
from verst.protocols import BackendState
from verst.training.megatron.layout import Layout
from verst.training.megatron.optimizer import MegatronAdamW
from verst.training.state import RankState, random_state, require_names, set_random_state


def capture(optimizer: MegatronAdamW, layout: Layout) -> RankState:
    """Copies this rank's state to the CPU. Names are `model/…`, `exp_avg/…` and `exp_avg_sq/…` of what this rank updates."""
    tensors = {name: part.detach().to("cpu", copy=True) for name, part in _parts(optimizer).items()}
    values = {**optimizer.counters(), "rng": random_state(), "layout": _described(layout)}
    return RankState(tensors, values, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def restore(optimizer: MegatronAdamW, state: BackendState, layout: Layout) -> None:
    """Takes a state of the same layout in. A collective.

    Raises `CheckpointError`, before anything is changed, if layout, names or shapes are others.
    """
    saved = state.values.get("layout")
    if saved != _described(layout):
        raise CheckpointError(
            f"checkpoint: it was saved by {saved or 'another backend'}, this run has {_described(layout)}; its shards fit no other layout: "
            "set train.ranks and train.megatron as they were, or start a new run from the exported model"
        )
    parts = _parts(optimizer)
    require_names(set(parts), set(state.tensors))
    for name, part in parts.items():
        if state.tensors[name].shape != part.shape:
            raise CheckpointError(
                f"checkpoint of another model: {name} has shape {tuple(state.tensors[name].shape)} instead of {tuple(part.shape)}; "
                "set model.path to the model the checkpoint was made of"
            )
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(state.tensors[name])
    optimizer.restored(state.values)
    set_random_state(state.values["rng"])


def _parts(optimizer: MegatronAdamW) -> dict[str, torch.Tensor]:
    parts: dict[str, torch.Tensor] = {}
    for name, part, master in optimizer.masters():
        moments = part.optimizer.state[master]
        parts |= {f"model/{name}": master, f"exp_avg/{name}": moments["exp_avg"], f"exp_avg_sq/{name}": moments["exp_avg_sq"]}
    return parts


def _described(layout: Layout) -> str:
    return f"{layout.world} ranks of the megatron backend ({layout})"
