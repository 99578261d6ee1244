"""Weights through a file that trainer and engines can both map: shared memory on one host, a shared disk on several.

One version is one flat file, laid out by `verst.weights.layout`. The manifest, not the file, says what lies where, so a reader needs both.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from verst.errors import ConfigError, InvariantViolation, WeightMismatch
from verst.types import Manifest, TensorEntry
from verst.weights.checksum import dtype_name, hashed, manifest_digest, tensor_checksum
from verst.weights.layout import BUCKET_BYTES, aligned, lay_out, lay_out_buckets
from verst.weights.location import version_file


def publish(version: int, tensors: Iterator[tuple[str, torch.Tensor]], directory: str | Path) -> Manifest:
    """Writes one version and hashes it on the way, from the tensors as given. The file appears under its name only when complete.

    Raises `ConfigError` if the location cannot take it (the partial file is removed), `InvariantViolation` if a name comes twice.
    """
    directory = Path(directory)
    path = version_file(directory, version)
    partial = path.with_suffix(".partial")
    entries: list[TensorEntry] = []
    needed_bytes = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb", buffering=0) as file:
                for name, tensor in tensors:
                    entries.append(_entry(name, tensor, tensor_checksum(tensor)))
                    start = aligned(needed_bytes)
                    needed_bytes = start + tensor.nbytes
                    _write(file.fileno(), tensor, start)
                os.truncate(file.fileno(), needed_bytes)  # empty tensors at the end write nothing
            partial.rename(path)
        finally:  # also when the iterator fails: half a version must not hold shared memory
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _no_room(directory, needed_bytes, error) from error
    return _manifest(version, str(path), entries)


def describe(version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> Manifest:
    """The manifest that `publish` would return, without writing anything: its location is empty."""
    return _manifest(version, "", [_entry(name, tensor, checksum) for name, tensor, checksum in hashed(tensors)])


@dataclass(frozen=True, slots=True)
class FileUpdate:
    """A published version on its way into an engine. Pickles as its manifest, so it can be sent to the engine's process."""

    manifest: Manifest

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Maps the file and yields its tensors one by one, without copying. Writing to one changes nothing on disk.

        Raises `WeightMismatch` if the file is missing or has another size than the manifest demands.
        """
        mapped = _map(self.manifest)
        layout = lay_out(self.manifest.entries)
        for entry, start in zip(layout.entries, layout.offsets, strict=True):
            dtype = getattr(torch, entry.dtype)
            if entry.nbytes == 0:
                yield entry.name, torch.empty(entry.shape, dtype=dtype)
            else:
                count = entry.nbytes // dtype.itemsize
                yield entry.name, torch.frombuffer(mapped, dtype=dtype, count=count, offset=start).view(entry.shape)

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The same tensors, those of a transfer's buckets together."""
        tensors = self.tensors()
        for bucket in lay_out_buckets(self.manifest.entries, BUCKET_BYTES):
            yield list(islice(tensors, len(bucket.entries)))

    def checksum(self, tensor: torch.Tensor) -> str:
        return tensor_checksum(tensor)


def _entry(name: str, tensor: torch.Tensor, checksum: str) -> TensorEntry:
    return TensorEntry(name, tuple(tensor.shape), dtype_name(tensor.dtype), checksum, tensor.nbytes)


def _manifest(version: int, location: str, entries: Sequence[TensorEntry]) -> Manifest:
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvariantViolation(f"the trainer published these tensors more than once: {', '.join(twice[:5])}")
    return Manifest(version, location, tuple(entries), manifest_digest(entries))


def _write(file: int, tensor: torch.Tensor, start: int) -> None:
    # Not by `Tensor.numpy`, after which a storage on the CPU can never be resized: its memory may be lent (`verst.weights.offload`).
    data = np.from_dlpack(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)).data
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _map(manifest: Manifest) -> mmap.mmap:
    needed_bytes = lay_out(manifest.entries).nbytes
    try:
        with Path(manifest.location).open("rb") as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != needed_bytes:
                raise WeightMismatch(
                    f"{manifest.location} (version {manifest.version}) has {found_bytes} bytes, its manifest demands {needed_bytes}"
                )
            # Copy on write: torch warns about read-only memory, and an engine that writes must not change what others read.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if found_bytes else mmap.mmap(-1, 1)
    except OSError as error:
        raise WeightMismatch(
            f"{manifest.location} (version {manifest.version}) cannot be read: {error.strerror}. "
            "Engines on other hosts than the trainer need weights.location on a shared disk"
        ) from error


def _no_room(directory: Path, needed_bytes: int, error: OSError) -> ConfigError:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return ConfigError(
        f"weights.location: {directory} cannot take the published weights ({error.strerror}): at least {needed_bytes} bytes are needed, "
        f"{shutil.disk_usage(existing).free} are free. Make room there, or set weights.location to a directory with more"
    )
