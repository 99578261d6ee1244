"""Stand-in for sgl-kernel on CPUs, which has no wheel for them: the operators that SGLang's CPU path calls whatever the hardware is.

Everything else has a native fallback in SGLang. Names that are imported and never reached exist and raise when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("sgl_kernel", "DEF")
_ROUTER = "(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, Tensor? bias=None) -> (Tensor, Tensor)"


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    _library.define(name + schema)

    def implement(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, function, "CPU")
        return function

    return implement


def _chosen(scores: torch.Tensor, topk: int, renormalize: bool, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the highest scores and their weights; a bias takes part in the choice only (DeepSeek-V3, arXiv 2412.19437)."""
    experts = torch.topk(scores if bias is None else scores + bias, topk, dim=-1).indices
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts.to(torch.int32)


@_operator("topk_softmax_cpu", _ROUTER)
def _topk_softmax(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _chosen(gating_output.float().softmax(-1), topk, renormalize, bias)


@_operator("topk_sigmoid_cpu", _ROUTER)
def _topk_sigmoid(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _chosen(gating_output.float().sigmoid(), topk, renormalize, bias)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Writes each request's new cache places into its row of the table, from its start to its end."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not available on this CPU")

    return absent
