"""Routes as they are recorded: compact, tied to their tokens, and refused where anything about them is wrong."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import RoutesRefused
from verst.types import NO_VERSION, Branch, RoutedExperts, Routes, Sample, Trajectory

_BYTE_EXPERTS = 256


def expert_dtype(experts: int) -> np.dtype[Any]:
    """The smallest type that holds the ids of so many experts."""
    return np.dtype(np.uint8 if experts <= _BYTE_EXPERTS else np.int16)


def tokens_digest(tokens_T: NDArray[np.int32]) -> str:
    """16 hexadecimal digits that change with any token id."""
    return hashlib.blake2b(np.ascontiguousarray(tokens_T, np.int32).tobytes(), digest_size=8).hexdigest()


def narrowed(experts_RLK: NDArray[Any], kind: RoutedExperts) -> NDArray[Any]:
    """Expert ids of any integer type in the smallest one. Raises `RoutesRefused` for a wrong shape, or ids that no expert has."""
    if experts_RLK.ndim != 3 or experts_RLK.shape[1:] != (kind.layers, kind.chosen):
        raise RoutesRefused(f"routes of shape {list(experts_RLK.shape)}, not [tokens, {kind.layers} layers, {kind.chosen} experts]")
    if experts_RLK.size and not 0 <= int(experts_RLK.min()) <= int(experts_RLK.max()) < kind.experts:
        low, high = int(experts_RLK.min()), int(experts_RLK.max())
        raise RoutesRefused(f"routes name experts {low} to {high}, but the model has 0 to {kind.experts - 1}")
    return experts_RLK.astype(expert_dtype(kind.experts), copy=False)


def routes_of(tokens_T: NDArray[np.int32], experts_TLK: NDArray[Any]) -> Routes:
    """Ties routes to the tokens they are of. [T] and [T − 1, L, K]."""
    return Routes(experts_TLK, tokens_digest(tokens_T))


def require_routes(carrier: Trajectory | Branch | Sample, kind: RoutedExperts) -> None:
    """Raises `RoutesRefused` unless every token that a policy sampled can be trained on the experts that it was sampled with."""
    routes, tokens_T = carrier.routes, carrier.tokens_T
    if not (carrier.versions_T != NO_VERSION).any():
        return  # a demonstration: nobody sampled it, so the trainer's own routes are the only ones
    if routes is None:
        raise RoutesRefused("no routes were recorded with its tokens")
    if len(routes.experts_TLK) != len(tokens_T) - 1:
        raise RoutesRefused(f"routes of {len(routes.experts_TLK)} tokens, not of the {len(tokens_T) - 1} that are inputs")
    if routes.digest != tokens_digest(tokens_T):
        raise RoutesRefused("its routes are of other tokens: were they edited after generation?")
    checked = narrowed(routes.experts_TLK, kind)
    columns = np.ascontiguousarray(np.moveaxis(checked, -1, 0))
    equal = np.zeros(checked.shape[:-1], np.bool_)
    for left, right in combinations(columns, 2):  # of 8 experts, an eighth of the time that sorting them takes
        equal |= left == right
    twice = np.argwhere(equal)
    if len(twice):
        token, layer = twice[0][:2]
        raise RoutesRefused(f"routes of token {token} name an expert of layer {layer} twice")
