"""Matrix products and row means on a GPU whose rows have the same bits however many there are.

cuBLAS picks another kernel, tile or split of the inner size for another number of rows. Here an element's sum goes over the inner size in
blocks of one size, in order, in one accumulator, whatever the tile; nothing is split and nothing tuned at run time. Imported only where
there are CUDA tensors: it needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# (rows, columns, warps, stages) of a tile: few rows are all waiting for weights, many are all arithmetic.
_FEW: tuple[int, int, int, int] = (64, 64, 4, 4)
_MANY: tuple[int, int, int, int] = (128, 128, 8, 3)
_FEW_ROWS = 256
_GROUP = 8  # tiles of rows that share their columns' weights in the cache
_LONGEST_MEAN = 65536


def invariant_product(
    left_MK: torch.Tensor, right_NK: torch.Tensor, dtype: torch.dtype, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """left · rightᵀ + bias, `[M, N]`, summed in float32 and rounded once to `dtype`. `left_MK`'s last axis is contiguous."""
    (rows, inner), columns = left_MK.shape, right_NK.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=left_MK.device)
    if not out.numel():
        return out
    right_NK = right_NK if right_NK.stride(1) == 1 else right_NK.contiguous()
    tile_m, tile_n, warps, stages = _FEW if rows <= _FEW_ROWS else _MANY
    precise = left_MK.dtype == torch.float32
    depth = 32 if precise else 64  # the same for both tiles, or they would sum in another order
    grid = (triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n),)
    tiles: Any = {"TILE_M": tile_m, "TILE_N": tile_n, "DEPTH": depth, "GROUP": _GROUP, "num_warps": warps}
    options: Any = tiles | {"HAS_BIAS": bias_N is not None, "EVEN": inner % depth == 0, "num_stages": 2 if precise else stages}
    operands = (left_MK, right_NK, out if bias_N is None else bias_N, out)
    with torch.cuda.device_of(left_MK):
        _product[grid](*operands, rows, columns, inner, left_MK.stride(0), right_NK.stride(0), **options)
    return out


def row_means(rows_RD: torch.Tensor) -> torch.Tensor:
    """The mean `[R]` of each row, in float32. Raises `ValueError` for rows longer than a block can be."""
    rows, width = rows_RD.shape
    if width > _LONGEST_MEAN:
        raise ValueError(f"rows of {width} numbers: at most {_LONGEST_MEAN} are averaged at once")
    out = torch.empty(rows, dtype=torch.float32, device=rows_RD.device)
    block = triton.next_power_of_2(width)
    options: Any = {"BLOCK": block, "num_warps": 1 if block <= 512 else 4}
    if rows:
        with torch.cuda.device_of(rows_RD):
            _row_mean[(rows,)](rows_RD, out, width, rows_RD.stride(0), **options)
    return out


@triton.jit(do_not_specialize=["rows"])
def _product(
    left,
    right,
    bias,
    out,
    rows,
    columns,
    inner,
    left_stride,
    right_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    across = tl.cdiv(columns, TILE_N)
    band = tile // (GROUP * across)
    band_rows = tl.minimum(tl.cdiv(rows, TILE_M) - band * GROUP, GROUP)
    within = tile % (GROUP * across)
    row = (band * GROUP + within % band_rows) * TILE_M + tl.arange(0, TILE_M)
    column = (within // band_rows) * TILE_N + tl.arange(0, TILE_N)
    # Rows and columns beyond the end are computed on the last ones, and not stored: no mask stands in the loop.
    near_row = tl.minimum(row, rows - 1).to(tl.int64)
    near_column = tl.minimum(column, columns - 1).to(tl.int64)
    place = tl.arange(0, DEPTH)
    lefts = left + near_row[:, None] * left_stride + place[None, :]
    rights = right + near_column[None, :] * right_stride + place[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, inner, DEPTH):
        if EVEN:
            a = tl.load(lefts)
            b = tl.load(rights)
        else:
            there = start + place < inner
            a = tl.load(lefts, mask=there[None, :], other=0.0)
            b = tl.load(rights, mask=there[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        lefts += DEPTH
        rights += DEPTH
    if HAS_BIAS:
        total += tl.load(bias + near_column)[None, :].to(tl.float32)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + near_row[:, None] * columns + near_column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_mean(values, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    value = tl.load(values + row * stride + place, mask=place < width, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(value, axis=0) / width)
