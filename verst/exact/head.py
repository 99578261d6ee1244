"""From hidden states to logits, and from a row of logits to what its log-probabilities need: one way for engine and trainer."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from verst.exact.rows import ELEMENTS


def operand(weight_VH: torch.Tensor) -> torch.Tensor:
    """The weight as it enters a matrix product: a CPU has no product of bfloat16 with float32 results, so it is widened once there."""
    return weight_VH.to(operand_dtype(weight_VH))


def operand_dtype(weight_VH: torch.Tensor) -> torch.dtype:
    return weight_VH.dtype if weight_VH.is_cuda else compute_dtype(weight_VH)


def compute_dtype(weight_VH: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight_VH.dtype == torch.float64 else torch.float32


def widens(operand_VH: torch.Tensor) -> bool:
    """Whether products of this operand need their results widened."""
    return operand_VH.is_cuda and operand_VH.dtype in (torch.bfloat16, torch.float16)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left, right, out_dtype=torch.float32) if widens(left) else torch.mm(left, right)


def head_logits(hidden_CH: torch.Tensor, operand_VH: torch.Tensor, bias_V: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    """Logits `[C, V]` in float32 (float64 for float64). On a CPU C has to be a multiple of `PRODUCT_ROWS` for bits that do not depend on C;
    on a GPU `exact` sees to that.
    """
    if exact and hidden_CH.is_cuda:
        from verst.exact.linear_kernels import invariant_product  # needs triton

        logits_CV = invariant_product(hidden_CH.to(operand_VH.dtype), operand_VH, torch.float32)
    else:
        logits_CV = product(hidden_CH.to(operand_VH.dtype), operand_VH.t())
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV


def row_sums(logits_CV: torch.Tensor, targets_C: torch.Tensor, factor: float) -> torch.Tensor:
    """[4, C]: with z = factor · logit, of each row m = max z, Σ exp(z − m), Σ exp(z − m) · (z − m), and the target's z.

    A target outside the row, which is in another rank's shard, counts as 0. A row's bits depend on no other row.
    """
    if fused(logits_CV):
        from verst.exact import logprob_kernels  # needs triton

        return logprob_kernels.row_sums(logits_CV.contiguous(), targets_C, factor)
    whole = _aligned_empty(logits_CV)
    below_CV = whole[: logits_CV.numel()].view(logits_CV.shape)
    torch.mul(logits_CV, factor, out=below_CV)
    inside_C, at_C = inside(targets_C, logits_CV.shape[1])
    target_C = below_CV.gather(1, at_C[:, None])[:, 0] * inside_C
    top_C = below_CV.amax(dim=1)
    below_CV -= top_C[:, None]
    weights_CV = whole.exp()[: logits_CV.numel()].view(logits_CV.shape)
    return torch.stack((top_C, weights_CV.sum(dim=1), weights_CV.mul_(below_CV).sum(dim=1), target_C))


def row_logs(total_C: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's sum, with the same bits in every place."""
    return pad(total_C, (0, -len(total_C) % ELEMENTS), value=1.0).log()[: len(total_C)]


def fused(logits_CV: torch.Tensor) -> bool:
    return logits_CV.is_cuda and logits_CV.dtype == torch.float32


def inside(targets_C: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is among so many words, and its place there, or any place if it is not."""
    return (targets_C >= 0) & (targets_C < size), targets_C.clamp(0, size - 1)


def _aligned_empty(like: torch.Tensor) -> torch.Tensor:
    """Flat memory for as many numbers, and zeros up to whole blocks of an elementwise kernel, whose ragged end has other last bits."""
    count = like.numel()
    flat = like.new_empty(count + -count % ELEMENTS)
    flat[count:] = 0
    return flat
