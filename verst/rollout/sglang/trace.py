"""Where a model's loader puts each tensor it is given: found by watching the copies it makes, so that it holds for every fused layout.

A loader slices a tensor and copies the slice into a slice of a parameter. Source and target of each copy are kept as views; afterwards the
tensor can be read back from where it went, as the parameter then holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def read_back(self, shape: tuple[int, ...], dtype: torch.dtype, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor as the parameters hold it. What this process holds no part of (other ranks do) is taken from `source`.

        Raises `TypeError` if a parameter cannot hold values of `dtype` exactly.
        """
        for _, target in self.copies:
            if torch.promote_types(target.dtype, dtype) != target.dtype:
                raise TypeError(f"is published as {dtype_name(dtype)}, but the engine's parameter is {dtype_name(target.dtype)}")
        if len(self.copies) == 1 and self.copies[0][1].shape == shape and self.copies[0][1].dtype == dtype:
            return self.copies[0][1]
        whole = sum(self.boxes().values()) == torch.Size(shape).numel()
        held = torch.empty(shape, dtype=dtype, device=self.copies[0][1].device) if whole else source().clone()
        for (offset, sizes, strides), target in self.copies:
            held.as_strided(sizes, strides, offset).copy_(target.reshape(sizes))
        return held


class CopyTrace:
    """Watches `Tensor.copy_` between tensors that are announced and the parameters of one model."""

    def __init__(self, model: torch.nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._targets = {tensor.untyped_storage().data_ptr(): None for tensor in tensors if tensor.numel()}
        self._sources: dict[int, tuple[str, torch.Tensor]] = {}
        self.landings: dict[str, Landing] = {}
        self.written: set[int] = set()  # storages

    def announce(self, name: str, tensor: torch.Tensor) -> None:
        """A contiguous tensor that is about to be loaded; it must live until `forget`."""
        self.landings.setdefault(name, Landing())
        self._sources[tensor.untyped_storage().data_ptr()] = (name, tensor)

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
        found = self._sources.get(source.untyped_storage().data_ptr())
        if found is None or source.numel() != target.numel():
            return
        name, whole = found
        box = (int(source.storage_offset() - whole.storage_offset()), tuple(source.shape), tuple(source.stride()))
        self.landings[name].copies.append((box, target.detach()))
