"""Where tensors lie in a flat buffer: a published file, or one of the buckets of a transfer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

from verst.types import TensorEntry

ALIGNMENT = 64
BUCKET_BYTES = 512 << 20
"""Of a transfer: large enough for the speed of the link, small enough to be held twice on both sides."""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """Where the tensors of a bucket lie, whatever they hold: one object for all versions of a model."""

    first: int  # of the tensors of the version
    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors in order, each at the next multiple of `ALIGNMENT` bytes."""

    entries: tuple[TensorEntry, ...]
    form: Form

    @property
    def offsets(self) -> tuple[int, ...]:
        return self.form.offsets

    @property
    def nbytes(self) -> int:
        return self.form.nbytes

    def __str__(self) -> str:
        names = [entry.name for entry in self.entries]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} tensors)" if names else "no tensors"


def lay_out(entries: Sequence[TensorEntry]) -> Layout:
    """All of them in one buffer."""
    return Layout(tuple(entries), _form(0, [entry.nbytes for entry in entries]))


def lay_out_buckets(entries: Sequence[TensorEntry], bucket_bytes: int) -> tuple[Layout, ...]:
    """Consecutive tensors in buffers of at most `bucket_bytes`; a module that is larger than that has one to itself.

    Tensors of one module (an attention, one expert) stay together, because there are loaders that join them.
    """
    forms = _forms(tuple((entry.name, entry.shape, entry.dtype, entry.nbytes) for entry in entries), bucket_bytes)
    return tuple(Layout(tuple(entries[form.first : form.first + len(form.offsets)]), form) for form in forms)


@lru_cache(maxsize=8)
def _forms(tensors: tuple[tuple[str, tuple[int, ...], str, int], ...], bucket_bytes: int) -> tuple[Form, ...]:
    buckets: list[list[int]] = []
    end = 0
    for _, module in groupby(tensors, key=lambda tensor: tensor[0].rsplit(".", 2)[0]):
        sizes = [nbytes for *_, nbytes in module]
        nbytes = _form(0, sizes).nbytes
        if not buckets or aligned(end) + nbytes > bucket_bytes:
            buckets.append([])
            end = 0
        buckets[-1] += sizes
        end = aligned(end) + nbytes
    firsts = accumulate((len(bucket) for bucket in buckets), initial=0)
    return tuple(_form(first, bucket) for first, bucket in zip(firsts, buckets, strict=False))


def _form(first: int, sizes: Sequence[int]) -> Form:
    offsets, end = [], 0
    for nbytes in sizes:
        offsets.append(aligned(end))
        end = offsets[-1] + nbytes
    return Form(first, tuple(offsets), end)


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
