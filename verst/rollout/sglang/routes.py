"""Recorded expert routes in SGLang's answers: the words it uses for them, and how they become Verst's compact rows.

SGLang sends them as base64 of int32 `[rows, layers, experts per token]`, with the dense layers among the layers. A row is of the token in
that place of the request's input and output; the newest token, which was no input, has none.

SGLang keeps a row beside the token's keys and values. Where a request used those of another from the prefix cache, it gets the row of the
pass that computed them, which had the same tokens before it and the same weights, because the cache key has their version.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import RoutesRefused
from verst.routing.kinds import moe_layers, routed_experts
from verst.routing.records import narrowed
from verst.types import RoutedExperts

FLAG = "enable_return_routed_experts"
"""The server's argument without which it records nothing."""

MOVES_CACHE = ("enable_hierarchical_cache",)
"""Server arguments under which SGLang moves keys and values to other places, and leaves the routes beside them behind."""


class RouteReader:
    """Reads the routes of one model. Raises `RoutesRefused` for what cannot be those of the tokens asked for.

    Args:
        kind: how the model routes.
        about: its `config.json`.
    """

    def __init__(self, kind: RoutedExperts, about: Mapping[str, Any]) -> None:
        self.kind = kind
        self._all_layers = int(about.get("text_config", about)["num_hidden_layers"])
        self._layers = moe_layers(about)

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> RouteReader | None:
        """For a model with this config; None for a dense one."""
        kind = routed_experts(about)
        return None if kind is None else cls(kind, about)

    @staticmethod
    def fields(start: int) -> dict[str, Any]:
        """What a request says to get the routes from this token on."""
        return {"return_routed_experts": True, "routed_experts_start_len": start}

    def rows(self, meta: Mapping[str, Any], start: int, end: int) -> NDArray[Any]:
        """[end − start, L, K] of the tokens `[start, end)` in an answer to a request that asked for those from `start` on."""
        sent = meta.get("routed_experts")
        if sent is None:
            raise RoutesRefused("SGLang returned no routes")
        try:
            ids = np.frombuffer(base64.b64decode(sent, validate=True), np.int32)
            experts_RLK = ids.reshape(-1, self._all_layers, self.kind.chosen)
        except (binascii.Error, TypeError, ValueError) as error:
            each = f"{self._all_layers} layers and {self.kind.chosen} experts for each token"
            raise RoutesRefused(f"SGLang returned routes that are not those of {each}: {error}") from error
        if len(experts_RLK) == end:  # releases that know no first token send all
            experts_RLK = experts_RLK[start:]
        if len(experts_RLK) != end - start:
            raise RoutesRefused(f"SGLang returned routes of {len(experts_RLK)} tokens, not of the {end - start} from token {start} on")
        return narrowed(experts_RLK[:, list(self._layers)], self.kind)
