"""Log-probabilities of tokens from hidden states, without ever holding the logits of all of them.

At a vocabulary of 151,936, float32 logits of 32,768 tokens take 19.9 GB, and plain autograd holds them three times. Here rows go
through the output layer in chunks that fit a byte budget. Backward needs each row's one-hot minus softmax: forward keeps those of the
first rows, in the weight's type, as far as a second budget goes, and backward computes the logits of the other rows again.

Bits: each row is reduced on its own, so its neighbours matter only where a matrix product picks another kernel for another number of
rows (`verst.exact.rows` says when). So chunks are filled up with zero rows, to a multiple of 16 on a CPU and to one constant size on a GPU;
only gradients of rows that were kept come from one product of them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from verst.exact.head import compute_dtype, fused, head_logits, inside, operand, operand_dtype, product, row_logs, row_sums, widens
from verst.exact.rows import PRODUCT_ROWS, filled

CHUNK_BYTES = 256 * 2**20
GPU_CHUNK_BYTES = 640 * 2**20  # 1,024 rows of the largest common vocabularies: with fewer, adding to the weight's gradient is all waiting
GPU_KEPT_BYTES = 2 * 2**30  # 7,000 rows of a vocabulary of 151,936: each saves backward one of three products of the output layer
_GPU_ROWS = 1024  # at most: enough to fill the device, and a small vocabulary must not make a huge chunk to fill up
_GPU_TILE = 128  # rows of a matrix product's tile: a part of one costs as much as a whole one


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The output layer's weight is one rank's rows of it: those from `start` on. The ranks of `group` hold all, in order."""

    group: dist.ProcessGroup
    start: int


@dataclass(frozen=True, slots=True)
class _Head:
    """What happens to a logit between the matrix product and the softmax: z ← cap · tanh(scale · z / cap) / temperature."""

    temperature: float
    softcap: float | None
    scale: float
    rows: int  # of one chunk
    kept: int  # rows whose one-hot minus softmax stays until backward
    multiple: int  # of which the rows of the last chunk, filled up, are one
    shard: VocabularyShard | None
    exact: bool


def token_logprobs(  # noqa: PLR0913 (what a head may do to a logit)
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
    kept_bytes: int | None = None,
    shard: VocabularyShard | None = None,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [N] under its row's softmax, and that distribution's entropy [N] in nats, without gradient.

    Logits are `hidden @ weight.T + bias`, times `scale` (Cohere's `logit_scale`, one over Granite's `logits_scaling`), softly capped
    (Gemma 2, arXiv 2408.00118 §2), over `temperature`. Logits and results are float32 also for bfloat16 weights (float64 for
    float64); on a GPU the product then takes bfloat16 in and gives float32 out. N may be 0: all gradients are then 0.

    `chunk_bytes` limits one chunk of logits (default `CHUNK_BYTES`, on a GPU `GPU_CHUNK_BYTES`) and `kept_bytes` what forward keeps for
    backward (default nothing, on a GPU `GPU_KEPT_BYTES`). Forward and backward hold up to three chunks, on a GPU one and a half, with a
    softcap two and a half. Backward sums the weight's gradient over chunks in float32 (4 · V · H bytes) and rounds once to the weight's
    type: a bfloat16 sum would drop whatever a chunk adds below 1/256 of it, and would depend on the chunk size.

    With `shard`, `weight_VH` and `bias` are that shard's and targets are counted over the whole vocabulary. All ranks of the group give the
    same hidden states and get the same results; the hidden states' gradient is then each rank's part of a sum.

    `exact`: a row's bits are those of the `hf` engine in deterministic mode, on a GPU too (on a CPU they always are).

    Raises `ValueError` if the temperature is not positive, or hidden states and weight differ in type or size.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: only a distribution with temperature above 0 has log-probabilities to train")
    if hidden_NH.dtype != weight_VH.dtype or hidden_NH.shape[-1] != weight_VH.shape[-1]:
        raise ValueError(
            f"hidden states {tuple(hidden_NH.shape)} {hidden_NH.dtype} do not fit the output layer's weight "
            f"{tuple(weight_VH.shape)} {weight_VH.dtype}; both need one type and one last size"
        )
    rows, multiple = _chunk_rows(weight_VH, chunk_bytes)
    goes_back = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    kept = _kept_rows(weight_VH, kept_bytes, len(hidden_NH), rows) if goes_back else 0
    head = _Head(temperature, softcap, scale, rows, kept, multiple, shard, exact)
    return _TokenLogprobs.apply(hidden_NH, weight_VH, bias, targets_N, head)  # pyright: ignore[reportReturnType]


def _chunk_rows(weight_VH: torch.Tensor, chunk_bytes: int | None) -> tuple[int, int]:
    allowed = (GPU_CHUNK_BYTES if weight_VH.is_cuda else CHUNK_BYTES) if chunk_bytes is None else chunk_bytes
    fitting = allowed // (weight_VH.shape[0] * compute_dtype(weight_VH).itemsize)
    if not weight_VH.is_cuda:
        return max(fitting // PRODUCT_ROWS, 1) * PRODUCT_ROWS, PRODUCT_ROWS
    rows = min(fitting, _GPU_ROWS)
    rows = rows // _GPU_TILE * _GPU_TILE if rows > _GPU_TILE else max(rows, 1)
    return rows, rows


def _kept_rows(weight_VH: torch.Tensor, kept_bytes: int | None, count: int, rows: int) -> int:
    """All rows, or as many whole chunks of them as fit."""
    allowed = (GPU_KEPT_BYTES if weight_VH.is_cuda else 0) if kept_bytes is None else kept_bytes
    fitting = allowed // (weight_VH.shape[0] * operand_dtype(weight_VH).itemsize)
    return count if count <= fitting else fitting // rows * rows


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N, entropy_N, lse_N = (hidden_NH.new_empty(len(hidden_NH), dtype=compute_dtype(weight_VH)) for _ in range(3))
        operand_VH = operand(weight_VH)
        kept_KV = operand_VH.new_empty(head.kept, len(weight_VH))
        own_N = _own_targets(targets_N, head.shard)
        for chunk in _chunks(0, len(hidden_NH), head.rows):
            hidden_CH, targets_C = (filled(t[chunk], head.multiple) for t in (hidden_NH, own_N))
            logits_CV = _logits(hidden_CH, operand_VH, bias_V, head)
            found = _of_all_words(row_sums(logits_CV, targets_C, _factor(head)), head.shard)
            for whole_N, found_C in zip((logprobs_N, entropy_N, lse_N), found, strict=True):
                whole_N[chunk] = found_C[: chunk.stop - chunk.start]
            if chunk.stop <= head.kept:
                own = slice(chunk.stop - chunk.start)
                _slope(logits_CV[own], lse_N[chunk], own_N[chunk], head, kept_KV[chunk])
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, lse_N, kept_KV)
        ctx.head = head
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH, bias_V, targets_N, lse_N, kept_KV = ctx.saved_tensors
        head, operand_VH = ctx.head, operand(weight_VH)
        sums = _Gradients(ctx.needs_input_grad, hidden_NH, operand_VH, bias_V, grads[0])
        if head.kept:
            sums.add(slice(head.kept), kept_KV, hidden_NH[: head.kept])
        own_N = _own_targets(targets_N, head.shard)
        for chunk in _chunks(head.kept, len(hidden_NH), head.rows):
            hidden_CH, targets_C = (filled(t[chunk], head.multiple) for t in (hidden_NH, own_N))
            lse_C = filled(lse_N[chunk], head.multiple, torch.inf)  # a softmax of 0, whatever the bias
            logits_CV = _logits(hidden_CH, operand_VH, bias_V, head)
            slope_CV = _slope(logits_CV, lse_C, targets_C, head, torch.empty_like(logits_CV, dtype=operand_VH.dtype))
            sums.add(chunk, slope_CV, hidden_CH)
        return (*sums.results(weight_VH, bias_V), None, None)


class _Gradients:
    """Gradients of hidden states, weight and bias, summed over chunks. Those that nobody needs are not made.

    A row's upstream gradient multiplies its hidden state on the way to the weight, and the product on the way to the hidden state: the
    slopes are never read just to be scaled.
    """

    def __init__(
        self, needs: tuple[bool, ...], hidden_NH: torch.Tensor, operand_VH: torch.Tensor, bias_V: torch.Tensor | None, grad_N: torch.Tensor
    ) -> None:
        compute = compute_dtype(operand_VH)
        self._operand_VH, self._grad_N = operand_VH, grad_N
        self._hidden_NH = torch.empty_like(hidden_NH) if needs[0] else None
        self._weight_VH = torch.zeros_like(operand_VH, dtype=compute) if needs[1] else None
        self._bias_V = torch.zeros_like(bias_V, dtype=compute) if bias_V is not None and needs[2] else None

    def add(self, chunk: slice, slope_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """Of the rows of `chunk`. Slopes and hidden states may have more rows, to fill the chunk up."""
        own_C = self._grad_N[chunk]
        grad_C1 = filled(own_C, len(slope_CV))[:, None]
        if self._bias_V is not None:
            self._bias_V += (slope_CV.to(self._bias_V.dtype) * grad_C1).sum(dim=0)
        if self._hidden_NH is not None:
            self._hidden_NH[chunk] = product(slope_CV, self._operand_VH)[: len(own_C)] * own_C[:, None]
        if self._weight_VH is not None:
            _add_product(self._weight_VH, slope_CV.t(), (hidden_CH * grad_C1).to(slope_CV.dtype))

    def results(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        weight = None if self._weight_VH is None else self._weight_VH.to(weight_VH.dtype)
        return self._hidden_NH, weight, None if self._bias_V is None or bias_V is None else self._bias_V.to(bias_V.dtype)


def _logits(hidden_CH: torch.Tensor, operand_VH: torch.Tensor, bias_V: torch.Tensor | None, head: _Head) -> torch.Tensor:
    """Logits but for `_factor`. The same call in forward and backward, so that both see the same bits."""
    logits_CV = head_logits(hidden_CH, operand_VH, bias_V, exact=head.exact)
    if head.softcap is not None:
        logits_CV.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap)
    return logits_CV


def _factor(head: _Head) -> float:
    """What logits are multiplied by as they are read: a pass over a chunk costs memory bandwidth."""
    return (1.0 if head.softcap is not None else head.scale) / head.temperature


def _of_all_words(sums_4C: torch.Tensor, shard: VocabularyShard | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of the target, entropy and log-sum-exp of each row, over the words of all ranks."""
    top_C, total_C, weighted_C, target_C = sums_4C
    if shard is not None:
        own_top_C, top_C = top_C, top_C.clone()
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=shard.group)
        shift_C = own_top_C - top_C
        sums_3C = torch.stack((shift_C.exp() * total_C, shift_C.exp() * (weighted_C + total_C * shift_C), target_C))
        dist.all_reduce(sums_3C, group=shard.group)
        total_C, weighted_C, target_C = sums_3C
    log_C = row_logs(total_C)
    lse_C = top_C + log_C
    return target_C - lse_C, log_C - weighted_C / total_C, lse_C


def _slope(logits_CV: torch.Tensor, lse_C: torch.Tensor, targets_C: torch.Tensor, head: _Head, out_CV: torch.Tensor) -> torch.Tensor:
    """Writes to `out_CV`, and returns, the slope of each row's log-probability along its matrix product: one-hot − softmax, through
    temperature, cap and scale. On a GPU that rounds it to the weight's type, which the next products need. The logits may be overwritten.
    """
    factor = _factor(head)
    if fused(logits_CV) and head.softcap is None:
        from verst.exact import logprob_kernels

        return logprob_kernels.slope(logits_CV, lse_C, targets_C, factor, out_CV)
    slope_CV = out_CV if out_CV.dtype == logits_CV.dtype else torch.empty_like(logits_CV)
    torch.mul(logits_CV, factor, out=slope_CV).sub_(lse_C[:, None]).exp_().neg_()
    inside_C, at_C = inside(targets_C, logits_CV.shape[1])
    slope_CV.scatter_add_(1, at_C[:, None], inside_C[:, None].to(slope_CV.dtype))
    slope_CV.mul_(factor)
    if head.softcap is not None:  # tanh' = 1 − tanh²
        slope_CV *= logits_CV.div_(head.softcap).square_().neg_().add_(1).mul_(head.scale)
    return out_CV.copy_(slope_CV)


def _own_targets(targets_N: torch.Tensor, shard: VocabularyShard | None) -> torch.Tensor:
    """Targets counted from this rank's first word: those of other ranks lie outside its rows."""
    return targets_N if shard is None else targets_N - shard.start


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if widens(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


def _chunks(first: int, count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(first, count, rows)]
