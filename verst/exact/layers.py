"""Linear layers, norms and routers of a transformers model on a GPU, whose rows have the same bits however many there are.

A CPU needs none of it: there rows in multiples of `verst.exact.rows` have that property with PyTorch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_MEAN = (torch.mean, torch.Tensor.mean)
_PER_ROW = (nn.Embedding, nn.LayerNorm)
"""Modules whose kernels compute each row on its own already."""


def use_exact_layers(model: nn.Module, head: nn.Module | None) -> None:
    """Replaces the forward of linear layers, and in all other modules that hold parameters themselves (norms, routers) the operations
    that would mix rows. The output layer `head` is computed apart.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if module is not head:
                module.forward = partial(_linear_forward, module)  # pyright: ignore[reportAttributeAccessIssue]
        elif _holds_parameters(module) and not isinstance(module, _PER_ROW):
            module.forward = partial(_watched_forward, module.forward)


def exact_linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, on a GPU with a row's own bits."""
    if not rows.is_cuda:
        return linear(rows, weight, bias)
    return _Linear.apply(rows, weight, bias)  # pyright: ignore[reportReturnType]


def _linear_forward(module: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return exact_linear(rows, module.weight, module.bias)


def _watched_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _OwnBits():
        return forward(*args, **kwargs)


def _holds_parameters(module: nn.Module) -> bool:
    """A module without children that has one or two parameters of one or two axes: a norm or a router, but not the experts of a layer."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not list(module.children()) and all(parameter.ndim <= 2 for parameter in own)


class _OwnBits(TorchFunctionMode):
    """Inside, means over the last axis and linear layers are those of this module. Belongs to the thread that entered it."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            return exact_linear(*args, **kwargs)
        if func in _MEAN and args and args[0].is_cuda and _last_axis(args, kwargs):
            keeps = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            mean = _Mean.apply(args[0])
            return mean if keeps else mean[..., 0]
        return func(*args, **kwargs)


def _last_axis(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    return axis in (-1, args[0].ndim - 1) and "dtype" not in kwargs


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from verst.exact.linear_kernels import invariant_product  # needs triton

        ctx.save_for_backward(rows, weight)
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        return invariant_product(flat, weight, rows.dtype, bias).view(*rows.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        of_rows = (grad @ weight).view(rows.shape) if needs[0] else None
        of_weight = grad.t() @ rows.reshape(-1, weight.shape[1]) if needs[1] else None
        return of_rows, of_weight, grad.sum(0) if needs[2] else None


class _Mean(torch.autograd.Function):
    """Of the last axis, which stays with size 1."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        from verst.exact.linear_kernels import row_means

        ctx.shape = values.shape
        means = row_means(values.reshape(-1, values.shape[-1]).contiguous())
        return means.view(*values.shape[:-1], 1).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (grads[0] / ctx.shape[-1]).expand(ctx.shape)
