"""Runs inside SGLang's scheduler processes, one for each rank: receives published versions and says what the model then holds.

SGLang calls `load_published` as a custom weight loader (`--custom-weight-loader`, `update_weights_from_tensor` with that `load_format`).
Its only payload is a directory, named by the "tensor": the engine wrote `request.json` there, each rank answers with `reply.RANK.json`.

    join     become members of the group that the trainer broadcasts to: the first rank is number `first`
    group    receive a version by that group and load it
    file     load a version from the file it was published in
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from verst.errors import WeightMismatch
from verst.rollout.sglang.loading import load
from verst.types import Manifest, TensorEntry
from verst.weights.files import FileUpdate
from verst.weights.group import GroupAddress, GroupUpdate, Member, join

LOADER = "verst.rollout.sglang.plugin.load_published"
_NAMED = 5

_member: Member | None = None
"""This rank's place in the weight group. It outlives a request, and a scheduler has one model."""


def load_published(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """Does what `request.json` says; every failure goes into the reply, because one that is raised ends the server."""
    directory = Path(named_tensors[0][0])
    rank, ranks = _rank()
    try:
        answer = _answer(model, json.loads((directory / "request.json").read_text()), rank)
    except Exception as error:  # noqa: BLE001 - the boundary to SGLang: what is raised here would end the server
        answer = {"error": str(error), "kind": type(error).__name__, "trace": traceback.format_exc()}
    reply = directory / f"reply.{rank}.json"
    reply.with_suffix(".partial").write_text(json.dumps({**answer, "ranks": ranks}))
    reply.with_suffix(".partial").rename(reply)


def _answer(model: torch.nn.Module, request: Mapping[str, Any], rank: int) -> dict[str, Any]:
    global _member
    if request["kind"] == "join":
        if _member is not None:
            _member.close()
        device = next(model.parameters()).device
        _member = join(GroupAddress(**request["address"]), request["first"] + rank, device=device, timeout_s=request["timeout_s"])
        return {}
    manifest = _manifest(request["manifest"])
    if request["kind"] == "group":
        return load(model, GroupUpdate(manifest, request["bucket_bytes"], request["deadline_s"]).at(_member))
    return load(model, FileUpdate(manifest))


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
            if any(entry.name in reply["damaged"] for reply in holders):
                found[entry.name] += ", and so it arrived"
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


def _manifest(value: Mapping[str, Any]) -> Manifest:
    entries = tuple(TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in value["entries"])
    return Manifest(value["version"], value["location"], entries, value["digest"])


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
