"""A published version on its way into a server: a file that its ranks map, or a group they are members of. Checksums come back."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.errors import EngineFailure, WeightMismatch
from verst.protocols import WeightUpdate
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.checkpoint import named
from verst.rollout.sglang.plugin import merged
from verst.types import Manifest
from verst.weights.files import FileUpdate, publish
from verst.weights.group import GroupAddress, GroupUpdate
from verst.weights.location import remove_directory, shared_memory
from verst.weights.names import parts

if TYPE_CHECKING:
    import torch

_GRACE_S = 10.0
"""A rank that waited in vain says so itself, a little later than its deadline."""


async def join_group(api: ServerApi, address: GroupAddress, first: int, ranks: int, timeout_s: float) -> None:
    """Makes the ranks of the server members of a weight group, from number `first` on. Raises `EngineFailure` with what a rank reported."""
    request = {"kind": "join", "address": asdict(address), "first": first, "timeout_s": timeout_s}
    await _ask(api, request, None, ranks, timeout_s + _GRACE_S)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version in the server's ranks: the checksum of each tensor as they hold it, and the slowest rank's seconds by phase."""

    checksums: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)


async def load_verified(api: ServerApi, update: WeightUpdate, ranks: int, deadline_s: float) -> Loaded:
    """Loads a version by the plugin.

    Raises `WeightMismatch` naming tensors that do not arrive or are not loaded, `EngineFailure` with what a rank reported.
    """
    manifest = update.manifest
    if isinstance(update, GroupUpdate):
        request = {"kind": "group", "bucket_bytes": update.bucket_bytes, "deadline_s": update.deadline_s, "manifest": asdict(manifest)}
        replies = await _ask(api, request, None, ranks, min(update.deadline_s + _GRACE_S, deadline_s))
        return _loaded(replies, manifest)
    with _file(update) as write:
        written = await asyncio.to_thread(write)
        request = {"kind": "file", "manifest": asdict(written)}
        return _loaded(await _ask(api, request, Path(written.location).parent, ranks, deadline_s), manifest)


def _loaded(replies: Sequence[Mapping[str, Any]], manifest: Manifest) -> Loaded:
    seconds = {phase: max(reply["seconds"][phase] for reply in replies) for phase in replies[0]["seconds"]}
    return Loaded(merged(replies, manifest.entries), seconds)


async def _ask(api: ServerApi, request: Mapping[str, Any], parent: Path | None, ranks: int, deadline_s: float) -> list[Mapping[str, Any]]:
    """What the plugin answers in each rank, through a directory below `parent`, by default in shared memory."""
    directory = _temporary(parent)
    try:
        (directory / "request.json").write_text(json.dumps(request))
        await api.load_published(str(directory), ranks, deadline_s)
        return _replies(directory, api.url)
    finally:
        remove_directory(directory)


async def load_unverified(api: ServerApi, update: WeightUpdate, model_path: str, deadline_s: float) -> Loaded:
    """Has a server without the plugin load the version as a Hugging Face checkpoint; returns the published checksums, unchecked."""
    with _checkpoint(update, model_path) as directory:
        await api.load_checkpoint(str(await asyncio.to_thread(directory)), deadline_s)
    return Loaded({entry.name: entry.checksum for entry in update.manifest.entries})


@contextmanager
def _file(update: WeightUpdate) -> Iterator[Any]:
    """A function that brings the version into a file the server can map, and returns that file's manifest."""
    if isinstance(update, FileUpdate):
        yield lambda: update.manifest
        return
    directory = _temporary(None)

    def write() -> Manifest:
        written = publish(update.manifest.version, update.tensors(), directory)
        _same_names(update.manifest, {entry.name for entry in written.entries})
        return written

    try:
        yield write
    finally:
        remove_directory(directory)


@contextmanager
def _checkpoint(update: WeightUpdate, model_path: str) -> Iterator[Any]:
    """A function that writes the version as a Hugging Face directory beside where it was published, and returns the directory."""
    from safetensors.torch import save_file

    directory = _temporary(Path(update.manifest.location).parent if isinstance(update, FileUpdate) else None)

    def write() -> Path:
        for file in Path(model_path).glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, directory)
        given: set[str] = set()
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in update.tensors():
            given.add(name)
            tensors |= {part: tensor[index].detach().cpu().clone() for part, index, _ in parts(name, tuple(tensor.shape))}
        _same_names(update.manifest, given)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    try:
        yield write
    finally:
        remove_directory(directory)


def _same_names(manifest: Manifest, given: set[str]) -> None:
    listed = {entry.name for entry in manifest.entries}
    if missing := listed - given:
        raise WeightMismatch(f"the update ended without {named(missing)}, which its manifest lists")
    if extra := given - listed:
        raise WeightMismatch(f"the update brings {named(extra)}, which its manifest does not list")


def _replies(directory: Path, url: str) -> list[Mapping[str, Any]]:
    replies = {file.name: json.loads(file.read_text()) for file in sorted(directory.glob("reply.*.json"))}
    wanted = max((reply["ranks"] for reply in replies.values()), default=1)
    for name, reply in replies.items():
        if "error" in reply:
            kind = WeightMismatch if reply["kind"] == WeightMismatch.__name__ else EngineFailure
            raise kind(f"SGLang at {url}, rank {name.split('.')[1]}, failed: {reply['kind']}: {reply['error']}")
    if len(replies) < wanted:
        raise EngineFailure(
            f"SGLang at {url}: {len(replies)} of {wanted} ranks answered in {directory.parent}, which all of them must be able to write"
        )
    return list(replies.values())


def _temporary(parent: Path | None) -> Path:
    return Path(tempfile.mkdtemp(prefix=".verst-update-", dir=parent or shared_memory()))
