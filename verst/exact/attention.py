"""Attention whose rows depend on their own query, keys and values alone, as functions in transformers' attention registry.

On a CPU it is the textbook formula, computed so that every shape that could change the order of a sum is fixed: queries in multiples of
a few rows, keys in multiples of 16 from the first position on. Positions that a query does not see have weight 0, and adding 0 changes no
bit, so a query that was one of many in a prefill or in training gets what it gets alone in decoding. On a GPU it is one kernel.

Only the forward pass needs equal bits. Gradients are those of PyTorch's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "verst_exact"

_KEYS = 16  # multiple of the keys: whole vectors of a softmax's sum
_SUMMED = 512  # keys at most in one sum of values; more are summed in this order
_QUERIES = 256  # of a sequence at once: what holds their weights is at most this times its length


def use_exact_attention(model: PreTrainedModel) -> None:
    """Has the model's attention computed here from now on: causal, of whole sequences."""
    AttentionInterface.register(_NAME, exact_attention)
    model.set_attn_implementation(_NAME)


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[B, heads, T, dim]` → `[B, T, heads, dim]`: causal attention of whole sequences that start at position 0.

    Raises `NotImplementedError` for a model that asks for more than a scale and a sliding window.
    """
    refuse_more(module, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal(query, key, value, scale, kwargs.get("sliding_window")), None


def refuse_more(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Raises `NotImplementedError` if attention is asked for something that is not computed."""
    for name, what in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks"), ("position_bias", "position biases")):
        if options.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} uses {what}, which the hf engine does not compute")


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """`query` `[B, heads, T, dim]`, keys and values `[B, kv_heads, T, dim]` → `[B, T, heads, dim]`. A window counts visible positions."""
    if window is not None and window >= query.shape[2]:
        window = None
    return _Causal.apply(query, key, value, scale, window)  # pyright: ignore[reportReturnType]


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window = scale, window
        if not query.is_cuda:
            return _causal_on_cpu(query, key, value, scale, window)
        from verst.exact.attention_kernels import causal_forward  # needs triton

        return causal_forward(query, key, value, scale, window)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out = plain_causal(query, key, value, ctx.scale, ctx.window)
        return (*torch.autograd.grad(out, (query, key, value), grads[0]), None, None)


def plain_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
    """The same by PyTorch's own kernels, whose order of sums is theirs to choose."""
    length, shared = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    is_causal = mask is None and length > 1
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()


def _causal_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    rows, heads, length, dim = query.shape
    padded = -length % _KEYS
    dtype = value.dtype
    query, key, value = (pad(tensor.float(), (0, 0, 0, padded)) if padded else tensor.float() for tensor in (query, key, value))
    grouped = query.reshape(rows, key.shape[1], -1, length + padded, dim)
    places = torch.arange(length + padded)
    out = []
    for start in range(0, length, _QUERIES):
        own = places[start : start + _QUERIES, None]
        stop = start + len(own)
        hidden = places[:stop] > own
        if window is not None:
            hidden |= places[:stop] <= own - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        block = grouped[:, :, :, start:stop]
        out.append(attend(block, key[:, :, :stop], value[:, :, :stop], mask, scale).view(rows, heads, len(own), -1))
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
    return joined[:, :, :length].transpose(1, 2).to(dtype).contiguous()


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """On a CPU: `query` `[B, kv_heads, heads of each, Q, dim]`, float32 keys and values `[B, kv_heads, L, dim]` → like the query.

    The result has the values' `dim`, which may be another. `mask` is added to the scores `[B, kv_heads, heads of each, Q, L]`; L is a
    multiple of 16.
    """
    rows, kv_heads, group, queries, dim = query.shape
    length = key.shape[2]
    own_rows = query.float().reshape(rows * kv_heads, group * queries, dim) * scale
    missing = -own_rows.shape[1] % (4 if max(dim, value.shape[3]) <= 64 else 16)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(pad(own_rows, (0, 0, 0, missing)) if missing else own_rows, keys.transpose(1, 2))
    used = scores[:, : group * queries].view(rows, kv_heads, group, queries, length)
    used += mask
    weights = scores.softmax(-1)
    out = torch.bmm(weights[..., :_SUMMED], values[:, :_SUMMED])
    for start in range(_SUMMED, length, _SUMMED):
        out += torch.bmm(weights[..., start : start + _SUMMED], values[:, start : start + _SUMMED])
    return out[:, : group * queries].reshape(rows, kv_heads, group, queries, -1)


def newest(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filled_R: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """On a GPU: `query` `[R, kv_heads, heads of each, dim]`, each at position `filled_R` of slots `[R, kv_heads, L, dim]` → its shape."""
    from verst.exact.attention_kernels import newest_forward

    return newest_forward(query, key, value, filled_R, scale, window)
