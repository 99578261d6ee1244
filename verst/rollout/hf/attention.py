"""Attention over the slot cache, as functions in transformers' attention registry.

A prefill is causal attention of one prompt over itself. A decode step has one query for each row, and the cache hands over the keys and
values of whole slots; a `DecodePlan` says how much of its slot each row has filled.

In exact mode both go through `verst.exact.attention`, where a row's bits depend on neither its neighbours nor the length that is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from verst.exact.attention import attend, causal, newest, plain_causal, refuse_more

NAME, EXACT_NAME = "verst_slots", "verst_exact_slots"
SHORTEST_TOKENS = 64


def attended_length(filled_R: NDArray[np.int64], limit: int, *, rounded: bool) -> int:
    """How much of their slots all rows attend to: a multiple of 64 that the longest fits into.

    `rounded` takes one of 64, 128, 256, …, for callers to whom each new length is expensive.
    """
    blocks = -(-(int(filled_R.max()) + 1) // SHORTEST_TOKENS)
    if rounded:
        blocks = 1 << (blocks - 1).bit_length()
    return min(blocks * SHORTEST_TOKENS, limit)


class DecodePlan:
    """What R rows attend to in one decode step: the first `length` positions of their slots, each up to and including `filled_R`.

    Masks are made once for all layers.
    """

    def __init__(self, filled_R: torch.Tensor, length: int, dtype: torch.dtype) -> None:
        self.filled_R, self.length = filled_R, length
        self._dtype = dtype
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """Additive mask `[R, 1, 1, length]`: 0 where a row attends. A window is the number of newest positions it sees."""
        if window not in self._masks:
            filled = self.filled_R[:, None, None, None]
            positions = torch.arange(self.length, device=filled.device)
            hidden = positions > filled
            if window is not None:
                hidden |= positions <= filled - window
            self._masks[window] = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return self._masks[window]


_plan: ContextVar[DecodePlan | None] = ContextVar("decode_plan", default=None)


@contextmanager
def decoding(plan: DecodePlan) -> Iterator[None]:
    """Forward passes inside are decode steps after this plan; all others are prefills."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def register() -> None:
    """Makes both names known to transformers. May be repeated."""
    for name, exact in ((NAME, False), (EXACT_NAME, True)):
        AttentionInterface.register(name, partial(slot_attention, exact=exact))


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    exact: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[rows, heads, tokens, dim]` → `[rows, tokens, heads, dim]`.

    Raises `NotImplementedError` for a model that asks for more than a scale and a sliding window.
    """
    refuse_more(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, plan = kwargs.get("sliding_window"), _plan.get()
    if plan is not None:
        return _decode(query, key, value, scale, window, plan, exact=exact), None
    return (causal if exact else plain_causal)(query, key, value, scale, window), None


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, plan: DecodePlan, *, exact: bool
) -> torch.Tensor:
    rows, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], plan.length
    # The query heads that share a key head pose as that many query tokens, so keys and values need not be repeated.
    grouped = query.view(rows, kv_heads, heads // kv_heads, dim)
    if query.device.type == "cpu":
        # Not PyTorch's kernel, which is as fast: with one query its bits change with the thread that computes a row (measured with
        # torch 2.13 from 2 threads on, for head size 32; it puts each thread's scratch at another alignment).
        keys, values = key[:, :, :length].float(), value[:, :, :length].float()
        out = attend(grouped[:, :, :, None], keys, values, plan.mask(window)[:, None], scale).to(value.dtype)
    elif exact:
        out = newest(grouped, key, value, plan.filled_R, scale, window)
    else:
        out = scaled_dot_product_attention(grouped, key[:, :, :length], value[:, :, :length], attn_mask=plan.mask(window), scale=scale)
    return out.reshape(rows, 1, heads, -1)
