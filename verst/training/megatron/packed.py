"""Samples of one forward pass laid end to end, as Megatron's packed ("thd") attention and context parallelism want them.

A sample's last token predicts nothing, so it is no input. With context parallelism each sequence is cut into 2 · ranks pieces and a rank
holds one from the front and its mirror image from the back (all ranks then have the same work), so sequences are filled up to a multiple
of that number. What is filled up lies behind a sequence's end, where causal attention never looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from verst.training.megatron.layout import Layout
from verst.training.microbatch import Microbatch
from verst.types import Sample

_CPU_ROWS = (
    4  # a CPU's matrix products give the same bits for a row among 4 or more rows, whatever their number: see verst.training.logprobs
)


@dataclass(frozen=True, slots=True)
class RankRoutes:
    """Recorded routes of the T tokens of a microbatch that one rank's routers see, in the order they see them."""

    experts_TLK: torch.Tensor
    """[T, L, K] uint8 or int16, for each layer that routes in this rank's stages. What was filled up has experts 0 to K − 1."""
    known_N: torch.Tensor
    """[N] int64, the tokens whose routes were recorded."""
    ages_N: NDArray[np.int64]
    """Their ages; see `verst.routing.differences.row_ages`."""
    free_T: torch.Tensor | None
    """[T, 1] bool, tokens of sequences without a record, which go where the live router sends them. None: there are none."""


@dataclass(frozen=True, slots=True)
class Packed(Microbatch):
    """`tokens_BT` is [1, T] with all sequences; positions count along T, over all context-parallel ranks."""

    lengths: tuple[int, ...] = field(kw_only=True)
    """Tokens of each sequence, what was filled up included. Their sum is T."""
    rank_routes: RankRoutes | None = field(default=None, kw_only=True)
    """What this rank's routers of the policy replay; None: they choose."""

    def own_places(self, rank: int, ranks: int) -> NDArray[np.int64]:
        """[T / ranks], the places along T whose tokens this context-parallel rank holds, in the order it holds them."""
        return _own_places(self.lengths, rank, ranks)

    def local_places(self, rank: int, ranks: int) -> torch.Tensor:
        """`own_places` as a tensor beside the tokens."""
        return torch.from_numpy(self.own_places(rank, ranks)).to(self.tokens_BT.device)


def pack(samples: Sequence[Sample], indices: tuple[int, ...], layout: Layout, device: torch.device) -> Packed:
    """The microbatch of these samples of a batch. Without any loss token it is one filler sequence with one target, to be weighed by 0."""
    rows = [samples[i] for i in indices]
    counts = tuple(int(row.loss_mask_T.sum()) for row in rows)
    if not sum(counts):
        zero = np.zeros(1, dtype=np.int64)
        return _packed((), [zero], [zero], [zero], (), layout, device)
    at = [np.flatnonzero(row.loss_mask_T) for row in rows]
    targets = [row.tokens_T[places].astype(np.int64) for row, places in zip(rows, at, strict=True)]
    return _packed(indices, [row.tokens_T[:-1] for row in rows], [places - 1 for places in at], targets, counts, layout, device)


def in_rounds(microbatches: Sequence[Packed], layout: Layout, device: torch.device) -> list[Packed]:
    """With what virtual stages need: they take microbatches in rounds of as many as there are stages."""
    missing = -len(microbatches) % layout.pipeline if layout.virtual > 1 else 0
    return [*microbatches, *[pack([], (), layout, device)] * missing]


def pack_probe(tokens_T: np.ndarray, layout: Layout, device: torch.device) -> Packed:
    """One sequence, every token but the first of which is a target."""
    tokens = tokens_T.astype(np.int64)
    return _packed((0,), [tokens[:-1]], [np.arange(len(tokens) - 1)], [tokens[1:]], (len(tokens) - 1,), layout, device)


def _packed(
    indices: tuple[int, ...],
    sequences: list[np.ndarray],
    positions: list[np.ndarray],
    targets: list[np.ndarray],
    counts: tuple[int, ...],
    layout: Layout,
    device: torch.device,
) -> Packed:
    each = 2 * layout.context if layout.context > 1 else 1
    together = math.lcm(each, layout.tensor * layout.context, _CPU_ROWS * layout.context)
    lengths = [-(-len(sequence) // each) * each for sequence in sequences]
    lengths[-1] += -sum(lengths) % together
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.zeros(sum(lengths), dtype=np.int64)
    for start, sequence in zip(starts, sequences, strict=True):
        tokens[start : start + len(sequence)] = sequence
    places = np.concatenate([start + place for start, place in zip(starts, positions, strict=True)])

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Packed(indices, tensor(tokens)[None], tensor(places), tensor(np.concatenate(targets)), counts, lengths=tuple(lengths))


def _own_places(lengths: Sequence[int], rank: int, ranks: int) -> np.ndarray:
    if ranks == 1:
        return np.arange(sum(lengths))
    places, start = [], 0
    for length in lengths:
        piece = length // (2 * ranks)
        places += [np.arange(start + p * piece, start + (p + 1) * piece) for p in (rank, 2 * ranks - 1 - rank)]
        start += length
    return np.concatenate(places)
