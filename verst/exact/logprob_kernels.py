"""The two passes over a chunk of logits on a GPU, each reading every logit once: `verst.training.logprobs` makes both, samplers the first.

PyTorch's own operators would read and write the chunk some ten times: 66 bytes of traffic for each logit instead of 18. Blocks and their
order are fixed and nothing is tuned at run time, so that a row always has the same bits. Imported only where there are CUDA tensors: it
needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 2048
# Fused multiply-adds would tell logits that were scaled before from those that are scaled here.
_LAUNCH: Any = {"BLOCK": _BLOCK, "num_warps": 8, "enable_fp_fusion": False}


def row_sums(logits_CV: torch.Tensor, targets_C: torch.Tensor, factor: float) -> torch.Tensor:
    """[4, C] float32: see `verst.exact.head.row_sums`. Logits are float32 and contiguous; a target outside its row counts as 0."""
    rows, vocabulary = logits_CV.shape
    sums = torch.empty(4, rows, dtype=torch.float32, device=logits_CV.device)
    with torch.cuda.device_of(logits_CV):
        _row_sums[(rows,)](logits_CV, targets_C, sums, factor, rows, vocabulary, **_LAUNCH)
    return sums


def slope(logits_CV: torch.Tensor, lse_C: torch.Tensor, targets_C: torch.Tensor, factor: float, out_CV: torch.Tensor) -> torch.Tensor:
    """factor · (one-hot − softmax), written to `out_CV`, of logits that are multiplied by `factor` before the softmax."""
    rows, vocabulary = logits_CV.shape
    grid = (rows, triton.cdiv(vocabulary, _BLOCK))
    with torch.cuda.device_of(logits_CV):
        _slope[grid](logits_CV, lse_C, targets_C, out_CV, factor, vocabulary, **_LAUNCH)
    return out_CV


@triton.jit
def _row_sums(logits, targets, sums, factor, rows, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocabulary
    lane = tl.arange(0, BLOCK)
    # Each lane keeps the sums of its own columns, relative to the largest of them so far.
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        there = start + lane < vocabulary
        logit = tl.load(base + start + lane, mask=there, other=-1e30) * factor
        higher = tl.maximum(top, logit)
        shift = top - higher
        keep = tl.exp(shift)
        below = logit - higher
        weight = tl.where(there, tl.exp(below), 0.0)
        weighted = keep * (weighted + total * shift) + tl.where(there, weight * below, 0.0)
        total = keep * total + weight
        top = higher
    highest = tl.max(top, axis=0)
    shift = top - highest
    keep = tl.where(total > 0, tl.exp(shift), 0.0)
    weighted = tl.where(total > 0, keep * (weighted + total * shift), 0.0)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocabulary)
    tl.store(sums + row, highest)
    tl.store(sums + rows + row, tl.sum(total * keep, axis=0))
    tl.store(sums + 2 * rows + row, tl.sum(weighted, axis=0))
    tl.store(sums + 3 * rows + row, tl.load(base + target, mask=inside, other=0.0) * factor)


@triton.jit
def _slope(logits, lse, targets, out, factor, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < vocabulary
    logit = tl.load(logits + row * vocabulary + column, mask=there, other=0.0) * factor
    softmax = tl.exp(logit - tl.load(lse + row))
    hot = tl.where(column == tl.load(targets + row), 1.0, 0.0)
    tl.store(out + row * vocabulary + column, ((hot - softmax) * factor).to(out.dtype.element_ty), mask=there)
