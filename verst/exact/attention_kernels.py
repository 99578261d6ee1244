"""Attention on a GPU, forward: one kernel for whole sequences and for one new token a row, with the same tiles for both.

A tile has 64 rows: queries of one head in a sequence, or in decoding the query heads that share a key head. Each goes over keys in blocks
of 64 from the first position on (with a window: from the block it begins in) by the online softmax of FlashAttention (arXiv 2205.14135).
A block that a row sees nothing of changes no bit of it, so how far its neighbours reach does not matter. Imported only where there are CUDA
tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 64
_KEYS = 64
_LAUNCH: Any = {"ROWS": _ROWS, "KEYS": _KEYS, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


def causal_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """`query` `[B, heads, T, dim]`, keys and values `[B, kv_heads, T, dim]` → `[B, T, heads, dim]`. The last axes are contiguous."""
    batch, heads, length, _ = query.shape
    out = torch.empty(batch, length, heads, value.shape[-1], dtype=query.dtype, device=query.device)
    grid = (triton.cdiv(length, _ROWS), heads, batch)
    strides = (query.stride(0), query.stride(1), query.stride(2), out.stride(0), out.stride(2), out.stride(1))
    _launch(grid, (query, key, value, out), out, strides, (length, heads // key.shape[1]), scale, window, decodes=False)
    return out


def newest_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filled_R: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """`query` `[R, kv_heads, heads of each, dim]`, each at position `filled_R` of slots `[R, kv_heads, L, dim]` → the query's shape."""
    rows, kv_heads, group, _ = query.shape
    out = torch.empty(rows, kv_heads, group, value.shape[-1], dtype=query.dtype, device=query.device)
    strides = (query.stride(0), query.stride(1), query.stride(2), out.stride(0), out.stride(1), out.stride(2))
    grid = (triton.cdiv(group, _ROWS), kv_heads, rows)
    _launch(grid, (query, key, value, out), filled_R, strides, (group, 1), scale, window, decodes=True)
    return out


def _launch(
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    filled: torch.Tensor,
    strides: tuple[int, ...],
    sizes: tuple[int, int],
    scale: float,
    window: int | None,
    *,
    decodes: bool,
) -> None:
    query, key, value, _ = tensors
    dims = {"DIM": query.shape[-1], "VALUE_DIM": value.shape[-1]}
    padded = {f"PADDED_{name}": max(16, triton.next_power_of_2(dim)) for name, dim in dims.items()}
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("attention takes tensors whose last axis is contiguous")
    numbers = (*strides, *key.stride()[:3], *value.stride()[:3], *sizes, scale * math.log2(math.e), window or 0)
    options: Any = _LAUNCH | dims | padded | {"WINDOWED": bool(window), "DECODES": decodes}
    launch: Any = _attention[grid]
    with torch.cuda.device_of(query):
        launch(*tensors, filled, *numbers, **options)


@triton.jit(do_not_specialize=["rows", "shared", "window"])
def _attention(
    query,
    key,
    value,
    out,
    filled,
    query_batch,
    query_unit,
    query_row,
    out_batch,
    out_unit,
    out_row,
    key_batch,
    key_head,
    key_place,
    value_batch,
    value_head,
    value_place,
    rows,
    shared,
    scale,
    window,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    DECODES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    unit = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = first + tl.arange(0, ROWS)
    lane = tl.arange(0, PADDED_DIM)
    there = (row < rows)[:, None] & (lane < DIM)[None, :]
    offsets = batch * query_batch + unit * query_unit + row.to(tl.int64)[:, None] * query_row + lane[None, :]
    q = tl.load(query + offsets, mask=there, other=0.0)
    if DECODES:
        newest = tl.load(filled + batch).to(tl.int32)
        at = newest + tl.zeros([ROWS], tl.int32)
        oldest = newest
    else:
        newest = tl.minimum(first + ROWS, rows) - 1
        at = row
        oldest = first
    keys = key + batch * key_batch + unit // shared * key_head
    values = value + batch * value_batch + unit // shared * value_head
    lane = tl.arange(0, PADDED_VALUE_DIM)
    # fmt: off
    result = _over_keys(
        q, keys, values, key_place, value_place, at, oldest, newest, scale, window,
        DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE_DIM, WINDOWED, ROWS, KEYS,
    )
    # fmt: on
    offsets = batch * out_batch + unit * out_unit + row.to(tl.int64)[:, None] * out_row + lane[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (lane < VALUE_DIM)[None, :])


@triton.jit
def _over_keys(
    q,
    keys,
    values,
    key_place,
    value_place,
    at,
    oldest,
    newest,
    scale,
    window,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """What rows at positions `at`, the first of them `oldest` and the last `newest`, take from the values they see."""
    lane = tl.arange(0, PADDED_DIM)
    value_lane = tl.arange(0, PADDED_VALUE_DIM)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(oldest - window + 1, 0) // KEYS * KEYS
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_VALUE_DIM], tl.float32)
    for start in range(begin, newest + 1, KEYS):
        place = start + tl.arange(0, KEYS)
        near = place <= newest
        far = place.to(tl.int64)
        k = tl.load(keys + far[None, :] * key_place + lane[:, None], mask=near[None, :] & (lane < DIM)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        seen = place[None, :] <= at[:, None]
        if WINDOWED:
            seen = seen & (place[None, :] > at[:, None] - window)
        score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        # A row that has seen nothing yet has no largest score to compare with.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(score - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weight, axis=1)
        there = near[:, None] & (value_lane < VALUE_DIM)[None, :]
        v = tl.load(values + far[:, None] * value_place + value_lane[None, :], mask=there, other=0.0)
        result = tl.dot(weight.to(v.dtype), v, result * keep[:, None], input_precision="ieee")
        top = higher
    return result / tl.where(total == 0.0, 1.0, total)[:, None]
