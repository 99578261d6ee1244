"""The weight files of a Hugging Face directory, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from verst.errors import ModelError


class WeightFiles:
    """Names and shapes of all tensors at once, contents on demand. Raises `ModelError` if there are no safetensors files."""

    def __init__(self, path: str, where: str | None = None) -> None:
        """`where` begins messages."""
        self.where = where or f"model.path {path}"
        found = sorted(Path(path).expanduser().glob("*.safetensors"))
        if not found:
            raise ModelError(f"{self.where}: no *.safetensors; train.backend megatron reads no other weights")
        self._files = [safe_open(str(file), framework="pt") for file in found]
        self._place: Mapping[str, int] = {name: i for i, file in enumerate(self._files) for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> Mapping[str, int]:
        return self._place

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._place[name]].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._files[self._place[name]].get_tensor(name)

    @staticmethod
    def missing_for(row: str, layer: int, expert: int) -> str:
        """How a message names a Megatron tensor that no file has a tensor for."""
        return row.format(layer=layer, expert=expert)
