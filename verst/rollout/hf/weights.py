"""Loading one published policy version into a model that is in use, by the names of transformers or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import torch

from verst.errors import WeightMismatch
from verst.model_spec import published_name
from verst.protocols import WeightUpdate
from verst.types import Manifest
from verst.weights.names import parts


@torch.no_grad()
def load_weights(model: torch.nn.Module, update: WeightUpdate) -> dict[str, str]:
    """Copies every tensor of an update whose manifest fits; returns the checksum of each as the model now holds it.

    Raises `WeightMismatch` naming tensors that come other than the manifest says.
    """
    targets = _targets(model)
    announced = {entry.name for entry in update.manifest.entries}
    loaded: set[str] = set()
    for name, tensor in update.tensors():
        if name not in announced:
            raise WeightMismatch(f"the update brings {name!r}, which its manifest does not list")
        _check_tensor(name, tensor, targets[name])
        targets[name].copy_(tensor)
        loaded.add(name)
    if missing := announced - loaded:
        raise WeightMismatch(f"the update ended without {_names(missing)}, which its manifest lists")
    return {entry.name: update.checksum(targets[entry.name]) for entry in update.manifest.entries}


def check_manifest(model: torch.nn.Module, manifest: Manifest) -> None:
    """Every listed tensor must fit, and every parameter must be listed under one of its names (tied weights have several), or in parts.

    Raises `WeightMismatch` naming the tensors.
    """
    targets = _targets(model)
    listed = {entry.name: entry for entry in manifest.entries}
    if unknown := listed.keys() - targets.keys():
        raise WeightMismatch(f"version {manifest.version} has {_names(unknown)}, which the engine's model does not have")
    for name, entry in listed.items():
        shape, dtype = tuple(targets[name].shape), _dtype(targets[name])
        if (entry.shape, entry.dtype) != (shape, dtype):
            raise WeightMismatch(f"{name!r} is published as {entry.dtype} {entry.shape}, but the engine's parameter is {dtype} {shape}")
    named = {published_name(model, name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    covered = {id(tensor) for name, tensor in named.items() if not _lacking(name, tensor, listed.keys())}
    parameters = ((published_name(model, name), tensor) for name, tensor in model.named_parameters())
    lacking = [_lacking(name, tensor, listed.keys()) for name, tensor in parameters if id(tensor) not in covered]
    if missing := set().union(*lacking):
        raise WeightMismatch(f"version {manifest.version} lacks {_names(missing)}: the engine would keep older weights there")


def _targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by every name that one may be published under: a fused one, and views of its parts."""
    whole = {published_name(model, name): tensor for name, tensor in model.state_dict().items()}
    return {part: tensor[index] for name, tensor in whole.items() for part, index, _ in parts(name, tuple(tensor.shape))} | whole


def _lacking(name: str, tensor: torch.Tensor, listed: AbstractSet[str]) -> set[str]:
    """What is not listed of a tensor that may come whole or in parts; its own name if nothing of it is."""
    if name in listed:
        return set()
    pieces = {part for part, _, _ in parts(name, tuple(tensor.shape))}
    return pieces - listed if pieces & listed else {name}


def _check_tensor(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (target.shape, target.dtype):
        raise WeightMismatch(
            f"{name!r} came as {_dtype(tensor)} {tuple(tensor.shape)}, but the engine's parameter is {_dtype(target)} {tuple(target.shape)}"
        )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(map(repr, ordered[:5])) + rest
