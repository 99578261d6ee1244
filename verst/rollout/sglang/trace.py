"""Where a model's loader puts each tensor it is given: found by watching the copies it makes, so that it holds for every fused layout.

A loader slices a tensor and copies the slice into a slice of a parameter. Source and target of each copy are kept as views; afterwards the
tensor can be read back from where it went, as the parameter then holds it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from verst.weights.checksum import dtype_name

Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Offset, sizes and strides of a slice, in elements of the contiguous tensor it was taken from."""


@dataclass(slots=True)
class Landing:
    """Where one tensor went: the slices of it that were copied, each with the part of a parameter that now holds it."""

    copies: list[tuple[Box, torch.Tensor]] = field(default_factory=list)

    def boxes(self) -> dict[Box, int]:
        """Each slice once, with its number of elements."""
        return {box: target.numel() for box, target in self.copies}

    def whole(self, shape: Sequence[int]) -> bool:
        """Whether this process holds all of the tensor."""
        return sum(self.boxes().values()) == torch.Size(shape).numel()

    @property
    def repeatable(self) -> bool:
        """Whether `pairs` can copy the tensor again."""
        return bool(self.copies) and all(target.is_contiguous() or target.shape == sizes for (_, sizes, _), target in self.copies)

    def pairs(self, tensor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Target and source of each copy that was seen, for another tensor of the same form; they have the same shape."""
        start = tensor.storage_offset()
        return [
            (target.reshape(sizes), tensor.as_strided(sizes, strides, start + offset)) for (offset, sizes, strides), target in self.copies
        ]

    def read_back(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor this process holds all of, as the parameters hold it.

        Raises `TypeError` if a parameter cannot hold values of `dtype` exactly.
        """
        self._check(dtype)
        if len(self.copies) == 1 and self.copies[0][1].shape == shape and self.copies[0][1].dtype == dtype:
            return self.copies[0][1]
        held = torch.empty(shape, dtype=dtype, device=self.copies[0][1].device)
        for (offset, sizes, strides), target in self.copies:
            held.as_strided(sizes, strides, offset).copy_(target.reshape(sizes))
        return held

    def held_slices(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """What the parameters hold of the tensor, slice by slice in the order of `pairs`. Raises `TypeError` as `read_back`."""
        self._check(dtype)
        return [target.reshape(sizes).to(dtype) for (_, sizes, _), target in self.copies]

    def _check(self, dtype: torch.dtype) -> None:
        for _, target in self.copies:
            if torch.promote_types(target.dtype, dtype) != target.dtype:
                raise TypeError(f"is published as {dtype_name(dtype)}, but the engine's parameter is {dtype_name(target.dtype)}")


class CopyTrace:
    """Watches `Tensor.copy_` between tensors that are announced and the parameters of one model."""

    def __init__(self, model: torch.nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._targets = {tensor.untyped_storage().data_ptr(): None for tensor in tensors if tensor.numel()}
        self._sources: list[tuple[int, str, torch.Tensor]] = []  # by address: tensors of a bucket lie in one storage
        self.landings: dict[str, Landing] = {}
        self.written: set[int] = set()  # storages
        self.foreign = False  # whether anything else was copied into the model

    def announce(self, name: str, tensor: torch.Tensor) -> None:
        """A contiguous tensor that is about to be loaded; it must live until `forget`."""
        self.landings.setdefault(name, Landing())
        if tensor.numel():
            insort(self._sources, (tensor.data_ptr(), name, tensor), key=lambda source: source[0])

    def forget(self) -> None:
        """The announced tensors are loaded: their memory may be used for others."""
        self._sources.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every copy of the block is seen, whatever thread of this process makes it."""
        original = torch.Tensor.copy_

        def copy_(target: torch.Tensor, source: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            result = original(target, source, *args, **options)
            self._record(target, source)
            return result

        torch.Tensor.copy_ = copy_  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.copy_ = original  # type: ignore[method-assign]

    def _record(self, target: torch.Tensor, source: Any) -> None:
        if not isinstance(source, torch.Tensor) or target.untyped_storage().data_ptr() not in self._targets:
            return
        self.written.add(target.untyped_storage().data_ptr())
        found = self._announced(source)
        if found is None or source.numel() != target.numel():
            self.foreign = True
            return
        name, offset = found
        self.landings[name].copies.append(((offset, tuple(source.shape), tuple(source.stride())), target.detach()))

    def _announced(self, source: torch.Tensor) -> tuple[str, int] | None:
        """The announced tensor that `source` is a part of, and where the part begins."""
        address = source.data_ptr()
        at = bisect_right(self._sources, address, key=lambda announced: announced[0]) - 1
        if at < 0:
            return None
        start, name, whole = self._sources[at]
        inside = address < start + whole.nbytes and source.dtype == whole.dtype
        return (name, (address - start) // whole.itemsize) if inside else None
