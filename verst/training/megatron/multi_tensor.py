"""Norm, scaling and rounding of all tensors at once, for Megatron's optimizer where neither TransformerEngine nor Apex is installed.

Megatron's own substitutes take one tensor after the other: the norm waits for the GPU at each, and scaling goes through a copy of each.
Masters are rounded into bfloat16 parameters one by one even with them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale


def install() -> None:
    """Takes the place of Megatron's substitutes and of its copying, and of nothing else."""
    module: Any = clip_grads
    optimizer._multi_tensor_copy_this_to_that = _copy
    if module.l2_norm_impl is local_multi_tensor_l2_norm:
        module.l2_norm_impl = _l2_norm
    if module.multi_tensor_scale_impl is local_multi_tensor_scale:
        module.multi_tensor_scale_impl = _scale


def _l2_norm(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool) -> Any:
    return torch.nn.utils.get_total_norm([tensor for tensors in tensor_lists for tensor in tensors]).reshape(1), None


def _copy(this: list[torch.Tensor], that: list[torch.Tensor], overflow_buf: torch.Tensor | None = None) -> None:
    if this:
        torch._foreach_copy_(that, this)  # pyright: ignore[reportPrivateImportUsage]


def _scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """Clipping gives the same list twice."""
    source, target = tensor_lists
    if source is not target:
        torch._foreach_copy_(target, source)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(target, scale)  # pyright: ignore[reportPrivateImportUsage]
