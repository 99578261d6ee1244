"""The row sums of `verst.weights.checksum` for many CUDA tensors at once: one kernel, which reads each byte once.

Without it a model of 300 tensors takes some thousand small kernels and seven passes over memory; the hash would take longer than the
transfer it checks. Imported only where there are CUDA tensors: it needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

_BLOCK_WORDS = 1024


def start_row_sums(tensors: Sequence[torch.Tensor], keys: torch.Tensor) -> Callable[[], list[NDArray[np.int64]]]:
    """Begins to sum; what it returns waits for A and B of each row of each tensor: `[rows, 2]` for every tensor, on the host.

    The tensors are contiguous, begin at multiples of 8 bytes, and lie on one device.
    """
    rows, bounds = _table(tuple((tensor.data_ptr(), tensor.nbytes) for tensor in tensors), 8 * len(keys), keys.device)
    if not bounds[-1]:
        return lambda: [np.zeros((0, 2), np.int64) for _ in tensors]
    sums = torch.empty(bounds[-1], 2, dtype=torch.int64, device=keys.device)
    with torch.cuda.device(keys.device):
        launch: Any = _sum_rows[(len(sums),)]
        launch(rows[0], rows[1], keys, sums, ROW_WORDS=len(keys), BLOCK=_BLOCK_WORDS)

    def wait() -> list[NDArray[np.int64]]:
        found = sums.cpu().numpy()
        return [found[start:end] for start, end in pairwise(bounds)]

    return wait


@lru_cache(maxsize=64)
def _table(places: tuple[tuple[int, int], ...], row_bytes: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Address and length of each row, `[2, rows]`, and where each tensor's rows begin. Kept: buckets and parameters stay where they are."""
    counts = [-(-nbytes // row_bytes) for _, nbytes in places]
    bounds = np.cumsum([0, *counts]).tolist()
    table = np.empty((2, bounds[-1]), np.int64)
    for (address, nbytes), start, end in zip(places, bounds, bounds[1:], strict=False):
        offsets = np.arange(end - start, dtype=np.int64) * row_bytes
        table[0, start:end] = address + offsets
        table[1, start:end] = np.minimum(row_bytes, nbytes - offsets)
    return torch.from_numpy(table).to(device), bounds


@triton.jit
def _sum_rows(addresses, lengths, keys, sums, ROW_WORDS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0)
    address = tl.load(addresses + row)
    length = tl.load(lengths + row)
    words = length // 8
    base = address.to(tl.pointer_type(tl.int64))
    a = tl.zeros([BLOCK], tl.int64)
    b = tl.zeros([BLOCK], tl.int64)
    for start in range(0, ROW_WORDS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(base + at, mask=at < words, other=0)
        key = tl.load(keys + at)
        a += word * key
        b += (word >> 32) * key
    # what is left of a last word that is not whole, filled up with zeros
    lane = tl.arange(0, 8)
    rest = address.to(tl.pointer_type(tl.uint8)) + words * 8 + lane
    byte = tl.load(rest, mask=lane < length - words * 8, other=0).to(tl.int64)
    last = tl.sum(byte << (8 * lane).to(tl.int64))
    key = tl.load(keys + words, mask=words < ROW_WORDS, other=0)
    tl.store(sums + 2 * row, tl.sum(a) + last * key)
    tl.store(sums + 2 * row + 1, tl.sum(b) + (last >> 32) * key)  # pyright: ignore[reportOperatorIssue] - it is a tensor
