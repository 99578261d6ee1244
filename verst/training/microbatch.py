"""Samples of one forward pass as tensors: tokens padded on the right, everything else flat over loss tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verst.types import Sample


@dataclass(frozen=True, slots=True)
class Microbatch:
    """`indices` are places in the batch, in the order of the rows; flat arrays run over the loss tokens of one row after another."""

    indices: tuple[int, ...]
    tokens_BT: torch.Tensor
    """[rows, longest − 1 or more] int64: a sample's last token predicts nothing, so it is no input."""
    positions_N: torch.Tensor
    """[N] int64, the place of the token before each loss token in the flattened `tokens_BT`."""
    targets_N: torch.Tensor
    """[N] int64, the loss tokens."""
    counts: tuple[int, ...]
    """Loss tokens of each row."""

    def sample_of_token(self) -> NDArray[np.int64]:
        """[N], the index in the batch of each loss token's sample."""
        return np.repeat(np.asarray(self.indices, dtype=np.int64), self.counts)

    @property
    def loss_tokens(self) -> int:
        return sum(self.counts)


def collate(samples: Sequence[Sample], indices: tuple[int, ...], device: torch.device, multiple: int = 1) -> Microbatch:
    """The microbatch of these samples of a batch, its tokens, padding included, a multiple of `multiple`.

    Without any loss token (a rank whose peers have more to do than it) it is one token with one target, to be weighed by 0: a
    sharded model's forward and backward are collectives, so every rank must run them.
    """
    rows = [samples[i] for i in indices]
    counts = tuple(int(row.loss_mask_T.sum()) for row in rows)
    if not sum(counts):
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return Microbatch((), zero.view(1, 1), zero, zero, ())
    width = padded_width(len(rows), max(len(row.tokens_T) for row in rows) - 1, multiple)
    tokens_BT = np.zeros((len(rows), width), dtype=np.int64)
    positions: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row.tokens_T) - 1] = row.tokens_T[:-1]
        at = np.flatnonzero(row.loss_mask_T)
        positions.append(place * width + at - 1)
        targets.append(row.tokens_T[at].astype(np.int64))

    def tensor(array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Microbatch(indices, tensor(tokens_BT), tensor(np.concatenate(positions)), tensor(np.concatenate(targets)), counts)


def padded_width(rows: int, width: int, multiple: int) -> int:
    """The least width, from `width` on, at which so many rows hold a multiple of `multiple` tokens."""
    step = multiple // math.gcd(multiple, rows)
    return -(-width // step) * step


def flat(values: Mapping[int, NDArray[np.float32]], microbatch: Microbatch) -> NDArray[np.float32]:
    """Joins the loss tokens' values of each sample, by its index, in the order of the microbatch."""
    return np.concatenate([values[i] for i in microbatch.indices])


def split(values_N: NDArray[np.float32], microbatch: Microbatch) -> dict[int, NDArray[np.float32]]:
    """The inverse of `flat`."""
    parts = np.split(values_N, np.cumsum(microbatch.counts)[:-1])
    return dict(zip(microbatch.indices, parts, strict=True))
