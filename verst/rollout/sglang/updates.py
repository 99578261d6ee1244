"""A published version on its way into a server: through a file that the server's ranks map, and back as checksums."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.errors import EngineFailure, WeightMismatch
from verst.protocols import WeightUpdate
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.checkpoint import named
from verst.rollout.sglang.names import parts
from verst.rollout.sglang.plugin import merged
from verst.types import Manifest
from verst.weights.files import FileUpdate, publish
from verst.weights.location import remove_directory

if TYPE_CHECKING:
    import torch

_SHARED_MEMORY = Path("/dev/shm")


async def load_verified(api: ServerApi, update: WeightUpdate, ranks: int, deadline_s: float) -> dict[str, str]:
    """Loads a version by the plugin; returns the checksum of each tensor as the ranks hold it.

    Raises `WeightMismatch` naming tensors that do not arrive or are not loaded, `EngineFailure` with what a rank reported.
    """
    with _file(update) as write:
        manifest = await asyncio.to_thread(write)
        directory = Path(tempfile.mkdtemp(prefix=".loading-", dir=Path(manifest.location).parent))
        try:
            (directory / "request.json").write_text(json.dumps(asdict(manifest)))
            await api.load_published(str(directory), ranks, deadline_s)
            return merged(_replies(directory, api.url), update.manifest.entries)
        finally:
            remove_directory(directory)


async def load_unverified(api: ServerApi, update: WeightUpdate, model_path: str, deadline_s: float) -> dict[str, str]:
    """Has a server without the plugin load the version as a Hugging Face checkpoint; returns the published checksums, unchecked."""
    with _checkpoint(update, model_path) as directory:
        await api.load_checkpoint(str(await asyncio.to_thread(directory)), deadline_s)
    return {entry.name: entry.checksum for entry in update.manifest.entries}


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
            raise kind(f"SGLang at {url}, rank {name.split('.')[1]}, could not load the version: {reply['kind']}: {reply['error']}")
    if len(replies) < wanted:
        raise EngineFailure(
            f"SGLang at {url}: {len(replies)} of {wanted} ranks answered in {directory.parent}, which all of them must be able to write"
        )
    return list(replies.values())


def _temporary(parent: Path | None) -> Path:
    if parent is None and _SHARED_MEMORY.is_dir():
        parent = _SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=".verst-update-", dir=parent))
