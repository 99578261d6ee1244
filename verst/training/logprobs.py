"""Log-probabilities of tokens from hidden states, without ever holding the logits of all of them.

At a vocabulary of 151,936, float32 logits of 32,768 tokens take 19.9 GB, and plain autograd holds them three times. Here rows go
through the output layer in chunks that fit a byte budget, and backward computes each chunk's logits again.

Bits: each row is reduced on its own, so its neighbours matter only where a matrix product picks another kernel for another number of
rows. Measured on a CPU in float32: rows behind the last multiple of 4 may differ (with one thread only in products of 1 to 3 rows, with
2 to 16 threads in products of up to 27), and no multiple of 4 ever did. On a GPU even large products differ. So chunks are filled up
with zero rows, to a multiple of 4 on a CPU and to one constant size on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
_CPU_ROWS = 4
_GPU_ROWS = 1024  # at most: enough to fill the device, and a small vocabulary must not make a huge chunk to fill up


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
    multiple: int  # of which the rows of the last chunk, filled up, are one
    shard: VocabularyShard | None


def token_logprobs(  # noqa: PLR0913 (what a head may do to a logit)
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    shard: VocabularyShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [N] under its row's softmax, and that distribution's entropy [N] in nats, without gradient.

    Logits are `hidden @ weight.T + bias`, times `scale` (Cohere's `logit_scale`, one over Granite's `logits_scaling`), softly capped
    (Gemma 2, arXiv 2408.00118 §2), over `temperature`. Logits and results are float32 also for bfloat16 weights (float64 for
    float64); on a GPU the product then takes bfloat16 in and gives float32 out. N may be 0: all gradients are then 0.

    `chunk_bytes` limits one chunk of logits; forward and backward hold up to two and a half such chunks. Backward sums the weight's
    gradient over chunks in float32 (4 · V · H bytes) and rounds once to the weight's type: a bfloat16 sum would drop whatever a chunk
    adds below 1/256 of it, and would depend on the chunk size.

    With `shard`, `weight_VH` and `bias` are that shard's and targets are counted over the whole vocabulary. All ranks of the group give the
    same hidden states and get the same results; the hidden states' gradient is then each rank's part of a sum.

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
    head = _Head(temperature, softcap, scale, rows, multiple, shard)
    return _TokenLogprobs.apply(hidden_NH, weight_VH, bias, targets_N, head)  # pyright: ignore[reportReturnType]


def _chunk_rows(weight_VH: torch.Tensor, chunk_bytes: int) -> tuple[int, int]:
    fitting = chunk_bytes // (weight_VH.shape[0] * _compute_dtype(weight_VH).itemsize)
    if weight_VH.is_cuda:
        rows = min(max(fitting, 1), _GPU_ROWS)
        return rows, rows
    return max(fitting // _CPU_ROWS, 1) * _CPU_ROWS, _CPU_ROWS


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N, entropy_N = (hidden_NH.new_empty(len(hidden_NH), dtype=_compute_dtype(weight_VH)) for _ in range(2))
        operand_VH = _operand(weight_VH)
        for chunk in _chunks(len(hidden_NH), head.rows):
            hidden_CH, targets_C = (_filled(t[chunk], head.multiple) for t in (hidden_NH, targets_N))
            logs_CV = _log_softmax(_logits(hidden_CH, operand_VH, bias_V, head), head.shard)
            own = slice(chunk.stop - chunk.start)
            logprobs_C, entropy_C = _of_targets(logs_CV, targets_C, head.shard), -(logs_CV.exp().mul_(logs_CV).sum(dim=1))
            if head.shard is not None:
                logprobs_C, entropy_C = _summed(torch.stack((logprobs_C, entropy_C)), head.shard)
            logprobs_N[chunk], entropy_N[chunk] = logprobs_C[own], entropy_C[own]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        ctx.head = head
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        compute = _compute_dtype(weight_VH)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=compute) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=compute) if needs_bias else None
        operand_VH = _operand(weight_VH)
        for chunk in _chunks(len(hidden_NH), ctx.head.rows):
            hidden_CH, targets_C, grad_C = (_filled(t[chunk], ctx.head.multiple) for t in (hidden_NH, targets_N, grads[0]))
            logits_CV = _logits(hidden_CH, operand_VH, bias_V, ctx.head)
            grad_CV = _grad_of_product(logits_CV, targets_C, grad_C, ctx.head)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0)
            # A GPU multiplies bfloat16: round here, as autograd does behind a `.float()` of bfloat16 logits.
            grad_CV = grad_CV.to(operand_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[chunk] = _product(grad_CV, operand_VH)[: chunk.stop - chunk.start]
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.t(), hidden_CH.to(operand_VH.dtype))
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )


def _logits(hidden_CH: torch.Tensor, operand_VH: torch.Tensor, bias_V: torch.Tensor | None, head: _Head) -> torch.Tensor:
    """Logits as they enter the softmax. The same call in forward and backward, so that both see the same bits."""
    logits_CV = _product(hidden_CH.to(operand_VH.dtype), operand_VH.t())
    if bias_V is not None:
        logits_CV += bias_V
    if head.scale != 1:  # each pass over a chunk costs memory bandwidth
        logits_CV *= head.scale
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_CV if head.temperature == 1 else logits_CV.div_(head.temperature)


def _grad_of_product(logits_CV: torch.Tensor, targets_C: torch.Tensor, grad_C: torch.Tensor, head: _Head) -> torch.Tensor:
    """Gradient of the matrix product: grad · (one-hot − softmax), through temperature, cap and scale."""
    if head.shard is None:
        probs_CV = torch.softmax(logits_CV, dim=1)
        probs_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    else:
        probs_CV = _log_softmax(logits_CV, head.shard).exp_()
        rows_C, local_C = _own_targets(targets_C, probs_CV.shape[1], head.shard)
        probs_CV[rows_C, local_C] -= 1
    if head.softcap is not None:  # tanh' = 1 − tanh²
        probs_CV *= logits_CV.mul_(head.temperature / head.softcap).square_().neg_().add_(1)
    return probs_CV.mul_(grad_C[:, None] * (-head.scale / head.temperature))


def _log_softmax(logits_CV: torch.Tensor, shard: VocabularyShard | None) -> torch.Tensor:
    if shard is None:
        return torch.log_softmax(logits_CV, dim=1)
    top_C = logits_CV.amax(dim=1)
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=shard.group)
    total_C = _summed((logits_CV - top_C[:, None]).exp_().sum(dim=1), shard)
    return logits_CV - (top_C + total_C.log())[:, None]


def _of_targets(logs_CV: torch.Tensor, targets_C: torch.Tensor, shard: VocabularyShard | None) -> torch.Tensor:
    """The targets' entries; with a shard 0 for those of other ranks."""
    if shard is None:
        return logs_CV.gather(1, targets_C[:, None])[:, 0]
    rows_C, local_C = _own_targets(targets_C, logs_CV.shape[1], shard)
    found_C = logs_CV.new_zeros(len(targets_C))
    found_C[rows_C] = logs_CV[rows_C, local_C]
    return found_C


def _own_targets(targets_C: torch.Tensor, size: int, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target this rank holds, and the target's place there."""
    local_C = targets_C - shard.start
    (rows_C,) = ((local_C >= 0) & (local_C < size)).nonzero(as_tuple=True)
    return rows_C, local_C[rows_C]


def _summed(tensor: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    dist.all_reduce(tensor, group=shard.group)
    return tensor


def _filled(tensor_C: torch.Tensor, multiple: int) -> torch.Tensor:
    """The rows of a chunk and zeros behind them. With a gradient of zero such rows add nothing to the weight's."""
    missing = -len(tensor_C) % multiple
    return torch.cat((tensor_C, tensor_C.new_zeros(missing, *tensor_C.shape[1:]))) if missing else tensor_C


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left, right, out_dtype=torch.float32) if _widens(left) else torch.mm(left, right)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if _widens(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


def _operand(weight_VH: torch.Tensor) -> torch.Tensor:
    """The weight as it enters a matrix product: a CPU has no product of bfloat16 with float32 results, so it is widened once there."""
    return weight_VH if weight_VH.is_cuda else weight_VH.to(_compute_dtype(weight_VH))


def _widens(operand: torch.Tensor) -> bool:
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def _compute_dtype(weight_VH: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight_VH.dtype == torch.float64 else torch.float32


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
