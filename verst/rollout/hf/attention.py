"""Attention over the slot cache, as one function in transformers' attention registry.

A prefill is ordinary causal attention of one prompt over itself. A decode step has one query for each row, and the cache hands over the
keys and values of whole slots; a `DecodePlan` says how much of its slot each row has filled.

The order in which a kernel adds up a row depends on the length it is given. So in exact mode a row always attends to the shortest of the
lengths 64, 128, 256, … that its own sequence fits into: the step computes all rows at each length that some row needs, and each row takes
the result of its own. Shapes are then a function of the row alone, and its bits do not depend on how far its neighbours reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "verst_slots"
SHORTEST_TOKENS = 64


def attended_lengths(filled_R: NDArray[np.int64], limit: int, *, exact: bool, rounded: bool = False) -> NDArray[np.int64]:
    """How much of its slot each row attends to, `[R]`: one of the lengths 64, 128, 256, … in exact mode, else as much as the longest needs.

    `rounded` takes the longest from the same few lengths, for callers to whom each new length is expensive.
    """
    blocks_R = -(-(filled_R + 1) // SHORTEST_TOKENS)
    if not exact:
        blocks_R = np.full_like(blocks_R, blocks_R.max())
    if exact or rounded:
        blocks_R = 2 ** np.ceil(np.log2(blocks_R)).astype(np.int64)
    return np.minimum(blocks_R * SHORTEST_TOKENS, limit)


class DecodePlan:
    """What each of R rows attends to in one decode step: its slot up to and including position `filled_R`, at its length `lengths_R`.

    `lengths` are the different values of `lengths_R`, in order. Masks are made once for all layers.
    """

    def __init__(self, filled_R: torch.Tensor, lengths_R: torch.Tensor, lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.lengths = lengths
        self._lengths_R = lengths_R[:, None, None, None]
        self._filled_R = filled_R[:, None, None, None]
        self._positions = torch.arange(lengths[-1], device=filled_R.device)
        self._dtype = dtype
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, length: int, window: int | None) -> torch.Tensor:
        """Additive mask `[R, 1, 1, length]`: 0 where a row attends. A window is the number of newest positions it sees."""
        if window not in self._masks:
            hidden = self._positions > self._filled_R
            if window is not None:
                hidden |= self._positions <= self._filled_R - window
            lowest = torch.finfo(self._dtype).min  # finite: a row that sees nothing at a length that is not its own must not give NaN
            self._masks[window] = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, lowest)
        return self._masks[window][..., :length]

    def own(self, length: int) -> torch.Tensor:
        """Rows `[R, 1, 1, 1]` whose own length this is."""
        return self._lengths_R == length


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
    """Makes `NAME` known to transformers. May be repeated."""
    AttentionInterface.register(NAME, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[rows, heads, tokens, dim]` → `[rows, tokens, heads, dim]`.

    Raises `NotImplementedError` for a model that asks for more than a scale and a sliding window.
    """
    for name, what in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks"), ("position_bias", "position biases")):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {what}, which the hf engine does not compute")
    window, plan = kwargs.get("sliding_window"), _plan.get()
    if plan is None:
        return _prefill(query, key, value, scaling, window), None
    return _decode(query, key, value, scaling, window, plan), None


def _prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
    length, shared = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    causal = mask is None and length > 1
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None, plan: DecodePlan
) -> torch.Tensor:
    rows, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    # The query heads that share a key head pose as that many query tokens, so keys and values need not be repeated.
    grouped = query.view(rows, kv_heads, heads // kv_heads, dim)
    attend = _attend_on_cpu if query.device.type == "cpu" else _attend
    merged = None
    for length in plan.lengths:
        out = attend(grouped, key, value, plan.mask(length, window), dim**-0.5 if scale is None else scale)
        merged = out if merged is None else torch.where(plan.own(length), out, merged)
    assert merged is not None
    return merged.reshape(rows, 1, heads, -1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    length = mask.shape[-1]
    return scaled_dot_product_attention(query, key[:, :, :length], value[:, :, :length], attn_mask=mask, scale=scale)


def _attend_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The textbook formula, in float32.

    As fast as PyTorch's CPU kernel for one query, whose bits change with the thread that computes a row (measured with torch 2.13
    from 2 threads on, for 1 query and head size 32; it puts each thread's scratch at another alignment).
    """
    (rows, kv_heads, queries, _), length = query.shape, mask.shape[-1]
    keys, values = key.flatten(0, 1)[:, :length].float(), value.flatten(0, 1)[:, :length].float()
    scores = torch.bmm(query.flatten(0, 1).float() * scale, keys.transpose(1, 2)).view(rows, kv_heads, queries, length)
    weights = scores.add_(mask).softmax(-1).flatten(0, 1)
    return torch.bmm(weights, values).view(rows, kv_heads, queries, -1).to(value.dtype)
