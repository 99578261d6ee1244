"""Where tensors lie in a flat buffer: a published file, or one of the buckets of a transfer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verst.types import TensorEntry

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors in order, each at the next multiple of `ALIGNMENT` bytes."""

    entries: tuple[TensorEntry, ...]
    offsets: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        names = [entry.name for entry in self.entries]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} tensors)" if names else "no tensors"


def lay_out(entries: Sequence[TensorEntry]) -> Layout:
    """All of them in one buffer."""
    offsets, end = [], 0
    for entry in entries:
        offsets.append(aligned(end))
        end = offsets[-1] + entry.nbytes
    return Layout(tuple(entries), tuple(offsets), end)


def lay_out_buckets(entries: Sequence[TensorEntry], bucket_bytes: int) -> tuple[Layout, ...]:
    """Consecutive tensors in buffers of at most `bucket_bytes`; a tensor larger than that has one to itself."""
    buckets: list[list[TensorEntry]] = []
    end = 0
    for entry in entries:
        if not buckets or aligned(end) + entry.nbytes > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1].append(entry)
        end = aligned(end) + entry.nbytes
    return tuple(lay_out(bucket) for bucket in buckets)


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
