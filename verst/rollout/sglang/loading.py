"""Loading a published version into the model of one SGLang rank, and saying what the model then holds. No SGLang.

Every tensor is hashed as it arrived, and again, when all are loaded, as the parameters hold it: by its published name, whatever fused
parameter it went into. The first version goes through the model's own loader, whose copies are watched. Where the loader did nothing
but copy whole tensors, later versions are copied to the same places directly: a loader looks up a name for each tensor, which for
a model of 1.7B parameters takes longer than the transfer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from verst.errors import WeightMismatch
from verst.rollout.sglang.trace import CopyTrace, Landing
from verst.types import Manifest, TensorEntry
from verst.weights.checksum import hashed, start_checksums, tensor_checksums
from verst.weights.files import FileUpdate
from verst.weights.group import GroupUpdate
from verst.weights.names import parts

T = TypeVar("T")
Bucket = Sequence[tuple[str, torch.Tensor]]
Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a version went: enough to copy those of the next one there."""

    layout: tuple[tuple[str, tuple[int, ...], str], ...]
    landings: dict[str, Landing]
    pairs: dict[tuple[str, tuple[int, ...]], Pairs] = field(default_factory=dict)  # by a bucket's first tensor and all addresses

    def copy(self, bucket: Bucket, *, same_buffers: bool) -> None:
        """`same_buffers`: the tensors lie in buffers that the next version comes in too, so that their views are worth keeping."""
        # Buckets of one form, such as layers of a size, come at the same addresses; names tell them apart.
        key = (bucket[0][0], tuple(tensor.data_ptr() for _, tensor in bucket)) if same_buffers and bucket else ("", ())
        found = self.pairs.get(key)
        if found is None:
            pairs = [pair for name, tensor in bucket for pair in self.landings[name].pairs(tensor)]
            found = [target for target, _ in pairs], [source for _, source in pairs]
            if same_buffers:
                self.pairs[key] = found
        targets, sources = found
        if targets:
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage] - it has no public name


_places: WeakKeyDictionary[torch.nn.Module, Places] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Arrived:
    """Checksums of what came: of whole tensors, and of the slices of those that this rank holds in part."""

    tensors: dict[str, str] = field(default_factory=dict)
    slices: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def load(model: torch.nn.Module, update: FileUpdate | GroupUpdate) -> dict[str, Any]:
    """Loads every tensor and reads each back from the parameters it went into, when all are loaded.

    Returns `seconds` (`receive`: until all had arrived and were copied; `load`: of the whole), `checksums` by published name, `boxes` (the
    slices of each tensor that this rank holds, with their sizes; only for tensors it does not hold whole), `damaged` (tensors that
    arrived other than they were published) and `stale` (parameters nothing was copied to). A tensor that the loader took no part of
    has no checksum.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a forward pass of before the update may still read the weights
    layout = tuple((entry.name, entry.shape, entry.dtype) for entry in update.manifest.entries)
    known = _places.pop(model, None)
    if known is not None and known.layout == layout:
        landings, stale = known.landings, []
        arrived = _receive(update, device, landings, partial(known.copy, same_buffers=isinstance(update, GroupUpdate)))
        _places[model] = known  # not after an update that broke off
    else:
        trace = CopyTrace(model)
        landings = trace.landings
        with trace.watching():
            arrived = _receive(update, device, landings, lambda bucket: _by_the_loader(model, bucket, trace))
        _tie(model, landings)
        stale = [name for name, p in model.named_parameters() if p.numel() and p.untyped_storage().data_ptr() not in trace.written]
        derives = trace.foreign or hasattr(model, "post_load_weights")  # makes something of the weights that is not a copy
        if not (stale or derives) and all(landing.repeatable for landing in landings.values()):
            _places[model] = Places(layout, landings)
    received = time.perf_counter()
    reply = {**_reply(update.manifest, arrived, landings), "stale": stale}
    return {**reply, "seconds": {"receive": received - start, "load": time.perf_counter() - start}}


def _receive(
    update: FileUpdate | GroupUpdate, device: torch.device, landings: Mapping[str, Landing], place: Callable[[Bucket], None]
) -> Arrived:
    arrived = Arrived()
    hashing: list[tuple[list[str], Callable[[], list[str]]]] = []  # a GPU goes on with the next bucket meanwhile
    for bucket in update.buckets():
        given = [(name, tensor.to(device)) for name, tensor in bucket]
        place(given)
        hashing.append(([name for name, _ in given], start_checksums([tensor for _, tensor in given])))
        for name, tensor in given:
            if landings[name].copies and not landings[name].whole(tensor.shape):
                arrived.slices[name] = tensor_checksums([source for _, source in landings[name].pairs(tensor)])
    for names, checksums in hashing:
        arrived.tensors.update(zip(names, checksums(), strict=True))
    return arrived


def _by_the_loader(model: torch.nn.Module, bucket: Bucket, trace: CopyTrace) -> None:
    for name, tensor in bucket:
        trace.announce(name, tensor)
    model.load_weights(  # type: ignore[operator]
        [(part, tensor[index]) for name, tensor in bucket for part, index, _ in parts(name, tuple(tensor.shape))]
    )
    trace.forget()


def _tie(model: torch.nn.Module, landings: dict[str, Landing]) -> None:
    """A tied output projection is not loaded: the model reads the embedding."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and _HEAD in landings and not landings[_HEAD].copies:
        landings[_HEAD] = landings.get(_EMBEDDING, landings[_HEAD])


def _reply(manifest: Manifest, arrived: Arrived, landings: Mapping[str, Landing]) -> dict[str, Any]:
    checksums: dict[str, str] = {}
    boxes: dict[str, list[Any]] = {}
    whole: list[TensorEntry] = []
    for entry in manifest.entries:
        landing = landings[entry.name]
        if not landing.copies:
            continue
        if landing.whole(entry.shape):
            whole.append(entry)
            continue
        held = tensor_checksums(_held(entry, landing.held_slices))
        other = [now for now, then in zip(held, arrived.slices[entry.name], strict=True) if now != then]
        checksums[entry.name] = other[0] if other else arrived.tensors[entry.name]
        boxes[entry.name] = [[list(map(_plain, box)), count] for box, count in landing.boxes().items()]
    read_back = ((entry.name, _held(entry, landings[entry.name].read_back)) for entry in whole)  # joined, those of a bucket at a time
    checksums |= {name: checksum for name, _, checksum in hashed(read_back)}
    damaged = [entry.name for entry in manifest.entries if arrived.tensors.get(entry.name) != entry.checksum]
    return {"checksums": checksums, "boxes": boxes, "damaged": damaged}


def _held(entry: TensorEntry, read: Callable[[tuple[int, ...], torch.dtype], T]) -> T:
    try:
        return read(entry.shape, getattr(torch, entry.dtype))
    except TypeError as error:
        raise WeightMismatch(f"{entry.name!r} {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
