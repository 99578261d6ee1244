"""A rank's training state: its shards of masters and moments, bit for bit, with the places in the whole model that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from verst.errors import CheckpointError
from verst.protocols import BackendState
from verst.training.checkpoints import LoadedState
from verst.training.critic import CRITIC
from verst.training.megatron.layout import Layout
from verst.training.megatron.optimizer import MegatronAdamW
from verst.training.megatron.reshard import Piece, SavedShards
from verst.training.megatron.tensors import ModelTensors
from verst.training.state import RankState, random_state, require_names, set_random_state


def capture(
    optimizer: MegatronAdamW, layout: Layout, tensors: ModelTensors, critic: tuple[MegatronAdamW, ModelTensors] | None = None
) -> RankState:
    """Copies this rank's state to the CPU. Names are `model/…`, `exp_avg/…` and `exp_avg_sq/…` of what this rank updates.

    Of a critic, if there is one, `critic/` is before the same names.
    """
    found, values = optimizer.tensors(), {**_counted(optimizer, tensors), "rng": random_state(), "layout": _described(layout)}
    if critic is not None:
        found |= {f"{CRITIC}{name}": part for name, part in critic[0].tensors().items()}
        values["critic"] = _counted(*critic)
    return RankState({name: part.detach().to("cpu", copy=True) for name, part in found.items()}, values, {})


def restore(
    optimizer: MegatronAdamW,
    state: BackendState,
    layout: Layout,
    tensors: ModelTensors,
    critic: tuple[MegatronAdamW, ModelTensors] | None = None,
) -> None:
    """Takes a state in: of the same layout, or one of any layout that comes with the files of all ranks. A collective.

    Raises `CheckpointError`, before anything is changed, if it is of another backend or model, or of another layout without files.
    """
    has, needs = "critic" in state.values, critic is not None
    if has != needs:
        raise CheckpointError(f"checkpoint: it has {'a' if has else 'no'} critic, and this run {'one' if needs else 'none'}")
    of_policy = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(CRITIC)}
    parts = optimizer.tensors()
    fitting = _fitting(optimizer, tensors, state, layout, of_policy, state.values)
    if critic is not None:
        of_critic = {name.removeprefix(CRITIC): tensor for name, tensor in state.tensors.items() if name.startswith(CRITIC)}
        fitting |= {f"{CRITIC}{name}": part for name, part in _fitting(*critic, state, layout, of_critic, state.values["critic"]).items()}
        parts |= {f"{CRITIC}{name}": part for name, part in critic[0].tensors().items()}
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(fitting[name])
    optimizer.restored(state.values)
    if critic is not None:  # whose place in the schedule is the policy's
        critic[0].restored({**state.values["critic"], "update": state.values["update"]})
    set_random_state(state.values["rng"])


def _counted(optimizer: MegatronAdamW, tensors: ModelTensors) -> dict[str, Any]:
    return {**optimizer.counters(), "pieces": {name: piece.described() for name, piece in _pieces(optimizer, tensors).items()}}


def _fitting(
    optimizer: MegatronAdamW,
    tensors: ModelTensors,
    state: BackendState,
    layout: Layout,
    given: Mapping[str, torch.Tensor],
    counted: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """For each tensor that this rank updates what the state has for it: `given` and `counted` are the model's parts of the state."""
    pieces, parts = _pieces(optimizer, tensors), optimizer.tensors()
    saved = state.values.get("layout")
    if saved == _described(layout) and counted.get("pieces") == {name: piece.described() for name, piece in pieces.items()}:
        return dict(_own(given, parts))
    if isinstance(state, LoadedState) and "pieces" in counted:
        with SavedShards(state.files, critic=counted is not state.values) as shards:
            return {name: shards.read(tensors, name.split("/", 1)[0], pieces[name.split("/", 1)[1]], part) for name, part in parts.items()}
    raise CheckpointError(
        f"checkpoint: it was saved by {saved or 'another backend'}, this run has {_described(layout)}, and it does not tell where its "
        "shards belong: set train.backend, train.ranks and train.megatron as they were, or start a new run from the exported model"
    )


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
