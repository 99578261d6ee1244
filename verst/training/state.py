"""A rank's training state: what is copied out, and how a state of any number of ranks is taken in."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from verst.errors import CheckpointError
from verst.protocols import BackendState
from verst.training.critic import CRITIC
from verst.training.distributed import own_rows
from verst.training.model import named
from verst.training.optimizer import MasterAdamW


@dataclass(slots=True)
class RankState:
    """See `verst.protocols.BackendState`. Names are `model/NAME` (float32 master), `exp_avg/NAME` and `exp_avg_sq/NAME`."""

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]
    full_shapes: Mapping[str, tuple[int, ...]]


def capture(optimizer: MasterAdamW, critic: MasterAdamW | None = None) -> RankState:
    """Copies this rank's state to the CPU. Random numbers are the process's own: torch's on the CPU and, if used, on the GPU.

    Of a critic, if there is one, `critic/` is before the same names.
    """
    tensors = {name: part.detach().to("cpu", copy=True) for name, part in _tensors(optimizer, critic).items()}
    values: dict[str, Any] = {**optimizer.counters(), "rng": random_state()}
    if critic is not None:
        values["critic"] = critic.counters()
    return RankState(tensors, values, _full_shapes(optimizer, critic))


def restore(optimizer: MasterAdamW, critic: MasterAdamW | None, state: BackendState, rank: int, world: int) -> None:
    """Takes a state in, whole tensors or this rank's shards, bit for bit.

    Raises `CheckpointError`, before anything is changed, if names or shapes are not those of this model.
    """
    parts, full_shapes = _tensors(optimizer, critic), _full_shapes(optimizer, critic)
    require_names(set(parts), set(state.tensors))
    _require_shapes(full_shapes, state.full_shapes)
    fitting = {}
    for name, part in parts.items():
        tensor = state.tensors[name]
        if tuple(tensor.shape) == full_shapes[name]:
            tensor = own_rows(tensor, rank, world)
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"checkpoint: {name} has shape {tuple(tensor.shape)}, but rank {rank} of {world} holds {tuple(part.shape)} of "
                f"{full_shapes[name]}; join the shards of a checkpoint from another number of ranks before loading it"
            )
        fitting[name] = tensor
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(fitting[name])
    optimizer.restored(state.values)
    if critic is not None:  # whose place in the schedule is the policy's
        critic.restored({**state.values["critic"], "update": state.values["update"]})
    set_random_state(state.values["rng"])


def _tensors(optimizer: MasterAdamW, critic: MasterAdamW | None) -> dict[str, torch.Tensor]:
    of_critic = {} if critic is None else {f"{CRITIC}{name}": tensor for name, tensor in critic.tensors().items()}
    return optimizer.tensors() | of_critic


def _full_shapes(optimizer: MasterAdamW, critic: MasterAdamW | None) -> dict[str, tuple[int, ...]]:
    return {
        f"{whose}{kind}/{name}": tuple(parameter.shape)
        for whose, one in (("", optimizer), (CRITIC, critic))
        if one is not None
        for name, parameter in one.parameters.items()
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def require_names(needed: set[str], given: set[str]) -> None:
    """Raises `CheckpointError`, naming the tensors, unless a state has the tensors of the model."""
    if needed == given:
        return
    lacking, foreign = sorted(needed - given), sorted(given - needed)
    parts = [f"it lacks {named(lacking)}"] * bool(lacking) + [f"it has {named(foreign)}, unknown to the model"] * bool(foreign)
    raise CheckpointError(f"checkpoint of another model: {' and '.join(parts)}; set model.path to the model the checkpoint was made of")


def _require_shapes(needed: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{n} {tuple(given.get(n, ()))} instead of {s}" for n, s in needed.items() if tuple(given.get(n, ())) != s]
    if wrong:
        raise CheckpointError(f"checkpoint of another model: {named(wrong)}; set model.path to the model the checkpoint was made of")


def random_state() -> dict[str, str]:
    """The process's random numbers, as JSON."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {kind: base64.b64encode(state.numpy().tobytes()).decode("ascii") for kind, state in states.items()}


def set_random_state(packed: Mapping[str, str]) -> None:
    """The inverse of `random_state`."""
    states = {kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for kind, text in packed.items()}
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
