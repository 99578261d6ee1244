"""From the shards of one layout to those of another, bit for bit.

Every shard in a checkpoint says which part of which tensor of the whole model it is. A rank of another layout reads the shards of the
tensors it has a part of, joins them into Hugging Face's full tensors by the family's table, and cuts its own part out by the same table.
No rank of the former layout is needed, and none waits for another.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from verst.errors import CheckpointError
from verst.training.critic import CRITIC
from verst.training.megatron.tensors import Key, ModelTensors


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a shard belongs: elements from `begin` on of the flattened part, of this shape, of tensor-parallel rank `rank` of `ranks`."""

    key: Key
    rank: int
    ranks: int
    shape: tuple[int, ...]
    begin: int

    def described(self) -> list[Any]:
        """As JSON."""
        return [list(self.key), self.rank, self.ranks, list(self.shape), self.begin]

    @classmethod
    def of(cls, described: Sequence[Any]) -> Piece:
        (row, layer, expert), rank, ranks, shape, begin = described
        return cls((row, layer, expert), rank, ranks, tuple(shape), begin)


class SavedShards:
    """The files of all ranks of one checkpoint, read tensor by tensor. Close it, or use it in a `with` block."""

    def __init__(self, files: Sequence[Path], *, critic: bool = False) -> None:
        """`critic`: those of the critic, in place of the policy's."""
        self._prefix = CRITIC if critic else ""
        self._opened = contextlib.ExitStack()
        self._where = str(files[0].parent)
        self._by_key: dict[Key, list[tuple[Any, str, Piece]]] = {}
        for path in files:
            file = self._opened.enter_context(safe_open(path, framework="pt"))
            values = json.loads(file.metadata()["values"])
            for name, described in (values["critic"] if critic else values)["pieces"].items():
                piece = Piece.of(described)
                self._by_key.setdefault(piece.key, []).append((file, name, piece))

    def read(self, tensors: ModelTensors, kind: str, own: Piece, like: torch.Tensor) -> torch.Tensor:
        """The elements of `own`, in the shape of `like`. `kind` is "model", "exp_avg" or "exp_avg_sq".

        Raises `CheckpointError` if the shards do not make up the tensor.
        """
        part = tensors.cut(own.key, self.parts(kind, own.key), own.rank, own.ranks)
        if tuple(part.shape) != own.shape:
            raise CheckpointError(
                f"{self._where} is of another model: {own.key[0]} of layer {own.key[1]} has shape {tuple(part.shape)}, not {own.shape}"
            )
        return part.flatten()[own.begin : own.begin + like.numel()].view_as(like)

    @property
    def keys(self) -> Set[Key]:
        """The tensors of the whole model that were updated."""
        return self._by_key.keys()

    def parts(self, kind: str, key: Key) -> list[torch.Tensor]:
        """One tensor as its tensor-parallel ranks held it, one part for each. Raises `CheckpointError` if the shards do not make it up."""
        saved = self._by_key.get(key)
        if saved is None:
            raise CheckpointError(
                f"{self._where} is of another model: it lacks {key[0]} of layer {key[1]}; "
                "set model.path to the model the checkpoint was made of"
            )
        ranks = saved[0][2].ranks
        return [self._part(kind, [(file, name, piece) for file, name, piece in saved if piece.rank == rank]) for rank in range(ranks)]

    def _part(self, kind: str, shards: Sequence[tuple[Any, str, Piece]]) -> torch.Tensor:
        """One tensor-parallel rank's part. Data-parallel ranks have pieces of it, or all of it; pipeline stages may both have it (tied)."""
        shape = shards[0][2].shape if shards else ()
        whole = torch.empty(math.prod(shape))
        done = 0
        for file, name, piece in sorted(shards, key=lambda shard: shard[2].begin):
            saved = f"{self._prefix}{kind}/{name}"
            end = piece.begin + math.prod(file.get_slice(saved).get_shape())
            if piece.begin <= done < end:
                whole[done:end] = file.get_tensor(saved).flatten()[done - piece.begin :]
                done = end
        if not shards or done != len(whole):
            about = f"{shards[0][2].key[0]} of layer {shards[0][2].key[1]}" if shards else "a tensor"
            raise CheckpointError(f"{self._where} is not whole: the shards of {about} have {done} of {len(whole)} elements")
        return whole.view(shape)

    def __enter__(self) -> SavedShards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()
