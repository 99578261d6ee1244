"""Runs inside SGLang's scheduler processes, one for each rank: loads a published version and says what the model then holds.

SGLang calls `load_published` as a custom weight loader (`--custom-weight-loader`, `update_weights_from_tensor` with that `load_format`).
Its only payload is a directory, named by the "tensor": the engine wrote `request.json` there, each rank answers with `reply.RANK.json`.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from verst.errors import WeightMismatch
from verst.rollout.sglang.names import parts
from verst.rollout.sglang.trace import CopyTrace, Landing
from verst.types import Manifest, TensorEntry
from verst.weights.checksum import tensor_checksum
from verst.weights.files import FileUpdate

LOADER = "verst.rollout.sglang.plugin.load_published"
_LAYER = re.compile(r"^.*?\.layers\.\d+\.")
_NAMED = 5


def load_published(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """Loads the version that `request.json` describes; every failure goes into the reply, because one that is raised ends the server."""
    directory = Path(named_tensors[0][0])
    rank, ranks = _rank()
    try:
        answer = load(model, FileUpdate(_manifest(directory / "request.json")))
    except Exception as error:  # noqa: BLE001 - the boundary to SGLang: what is raised here would end the server
        answer = {"error": str(error), "kind": type(error).__name__, "trace": traceback.format_exc()}
    reply = directory / f"reply.{rank}.json"
    reply.with_suffix(".partial").write_text(json.dumps({**answer, "ranks": ranks}))
    reply.with_suffix(".partial").rename(reply)


@torch.no_grad()
def load(model: torch.nn.Module, update: FileUpdate) -> dict[str, Any]:
    """Loads every tensor and reads each back from the parameters it went into, when all are loaded.

    Returns `checksums` by published name, `boxes` (the slices of each tensor that this rank holds, with their sizes; only for tensors
    it does not hold whole) and `stale` (parameters nothing was copied to). A tensor that the loader took no part of has no checksum.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a forward pass of before the update may still read the weights
    trace = CopyTrace(model)
    with trace.watching():
        for group in _by_layer(update.tensors()):
            given = [(name, tensor.to(device)) for name, tensor in group]
            for name, tensor in given:
                trace.announce(name, tensor)
            model.load_weights(  # type: ignore[operator]
                [(part, tensor[index]) for name, tensor in given for part, index, _ in parts(name, tuple(tensor.shape))]
            )
            trace.forget()
    return _held(model, update, trace)


def _held(model: torch.nn.Module, update: FileUpdate, trace: CopyTrace) -> dict[str, Any]:
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    checksums: dict[str, str] = {}
    boxes: dict[str, list[Any]] = {}
    for name, source in update.tensors():
        landing = trace.landings[name]
        if not landing.copies and tied and name == "lm_head.weight":
            landing = trace.landings.get("model.embed_tokens.weight", landing)
        if not landing.copies:
            continue
        checksums[name] = _checksum(name, source, landing)
        if sum(landing.boxes().values()) != source.numel():
            boxes[name] = [[list(map(_plain, box)), count] for box, count in landing.boxes().items()]
    stale = [name for name, p in model.named_parameters() if p.numel() and p.untyped_storage().data_ptr() not in trace.written]
    return {"checksums": checksums, "boxes": boxes, "stale": stale}


def _checksum(name: str, source: torch.Tensor, landing: Landing) -> str:
    try:
        return tensor_checksum(landing.read_back(tuple(source.shape), source.dtype, lambda: source.to(landing.copies[0][1].device)))
    except TypeError as error:
        raise WeightMismatch(f"{name!r} {error}") from error


def merged(replies: Sequence[Mapping[str, Any]], entries: Sequence[TensorEntry]) -> dict[str, str]:
    """Checksums by name from all ranks' replies: the one all agree on, or the first that differs from what was published.

    Raises `WeightMismatch` naming the tensors that no rank, or only some, hold, and the parameters that kept older weights.
    """
    stale = sorted({name for reply in replies for name in reply["stale"]})
    if stale:
        raise WeightMismatch(f"nothing was loaded into {_list(stale)}: the engine would keep older weights there")
    found: dict[str, str] = {}
    incomplete: list[str] = []
    for entry in entries:
        holders = [reply for reply in replies if entry.name in reply["checksums"]]
        held = {reply["checksums"][entry.name] for reply in holders}
        if held:
            found[entry.name] = next(iter(sorted(held - {entry.checksum})), entry.checksum)
        if not _whole(entry, holders):
            incomplete.append(entry.name)
    if incomplete:
        raise WeightMismatch(
            f"the engine did not load {_list(incomplete)} as it came: the model's loader left it out, or converts it on the way, "
            "so what it holds cannot be compared with what was published"
        )
    return found


def _whole(entry: TensorEntry, holders: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the ranks' slices together make the tensor: one rank holds it, or different slices add up to it."""
    if any(entry.name not in reply["boxes"] for reply in holders):
        return True
    slices = {json.dumps(box): count for reply in holders for box, count in reply["boxes"][entry.name]}
    return sum(slices.values()) == torch.Size(entry.shape).numel()


def _by_layer(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Neighbours of one layer together: some loaders join tensors of a layer, and the memory taken is one layer's."""
    group: list[tuple[str, torch.Tensor]] = []
    of: str | None = None
    for name, tensor in tensors:
        match = _LAYER.match(name)
        layer = match.group() if match else name
        if group and layer != of:
            yield group
            group = []
        group.append((name, tensor))
        of = layer
    if group:
        yield group


def _manifest(path: Path) -> Manifest:
    request = json.loads(path.read_text())
    entries = tuple(TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in request["entries"])
    return Manifest(request["version"], request["location"], entries, request["digest"])


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return os.getpid(), 1


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
