"""Loading one published policy version into a model that is in use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from verst.errors import WeightMismatch
from verst.protocols import WeightUpdate
from verst.types import Manifest


@torch.no_grad()
def load_weights(model: torch.nn.Module, update: WeightUpdate) -> dict[str, str]:
    """Copies every tensor of an update whose manifest fits; returns the checksum of each as the model now holds it.

    Raises `WeightMismatch` naming tensors that come other than the manifest says.
    """
    targets = model.state_dict(keep_vars=True)
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
    return {entry.name: update.checksum(targets[entry.name].detach()) for entry in update.manifest.entries}


def check_manifest(model: torch.nn.Module, manifest: Manifest) -> None:
    """Every listed tensor must fit, and every parameter must be listed under one of its names (tied weights have several).

    Raises `WeightMismatch` naming the tensors.
    """
    targets = model.state_dict(keep_vars=True)
    listed = {entry.name: entry for entry in manifest.entries}
    if unknown := listed.keys() - targets.keys():
        raise WeightMismatch(f"version {manifest.version} has {_names(unknown)}, which the engine's model does not have")
    for name, entry in listed.items():
        shape, dtype = tuple(targets[name].shape), _dtype(targets[name])
        if (entry.shape, entry.dtype) != (shape, dtype):
            raise WeightMismatch(f"{name!r} is published as {entry.dtype} {entry.shape}, but the engine's parameter is {dtype} {shape}")
    covered = {id(targets[name]) for name in listed}
    if missing := {name for name, parameter in model.named_parameters() if id(parameter) not in covered}:
        raise WeightMismatch(f"version {manifest.version} lacks {_names(missing)}: the engine would keep older weights there")


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
