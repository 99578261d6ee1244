"""One generation on its way: what it has so far, and the request to the server that fetches more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from verst.errors import EngineFailure
from verst.rollout.sglang.filters import filters, request_fields
from verst.types import FinishReason, GenerateRequest, Generation

STOP_STRING_TOKENS = 32
"""Tokens asked for at once when stop strings are looked for between: SGLang knows no text, because it has no tokenizer."""


class PauseMode(StrEnum):
    """What a pause does with the requests in flight, in SGLang's words."""

    IN_PLACE = "in_place"  # they go on after `resume` from the keys and values they have, also under newer weights
    RETRACT = "retract"  # they go on after `resume`; keys and values are computed again, by the weights of then
    ABORT = "abort"  # they end with `FinishReason.ABORT`


@dataclass
class Run:
    """A request with the tokens it has so far. The server may be asked several times: after a pause, and between stop strings."""

    request: GenerateRequest
    limit: int  # new tokens
    cache_key: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    aborted: bool = False
    server_id: str | None = None  # while the server works on it
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when something happened that a waiting run must see

    def body(self, server_id: str) -> dict[str, Any]:
        """The next question to the server."""
        sampling = self.request.sampling
        missing = self.limit - len(self.tokens)
        parameters: dict[str, Any] = {
            "max_new_tokens": min(missing, STOP_STRING_TOKENS) if sampling.stop else missing,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_token_ids) or None,
            "sampling_seed": self.request.seed & 0x7FFF_FFFF_FFFF_FFFF,
        }
        extra: dict[str, Any] = {}
        if filters(sampling):
            extra, parameters["custom_params"] = request_fields(sampling)
        return {
            "rid": server_id,
            "input_ids": [*self.request.tokens_T.tolist(), *self.tokens],
            "sampling_params": parameters,
            "return_logprob": True,
            "extra_key": self.cache_key,
            **extra,
        }

    def take(self, answer: Mapping[str, Any], version: int) -> FinishReason:
        """Adds what the server generated, all with one version. Raises `EngineFailure` if the answer does not hold together."""
        meta = answer["meta_info"]
        tokens = answer["output_ids"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or ()][-len(tokens) :] if tokens else []
        if len(logprobs) != len(tokens):
            raise EngineFailure(
                f"SGLang answered request {self.request.id} with {len(tokens)} tokens and {len(logprobs)} log-probabilities"
            )
        greedy = self.request.sampling.temperature == 0
        if not all(isinstance(value, float) and math.isfinite(value) for value in logprobs):
            raise EngineFailure(f"SGLang answered request {self.request.id} with log-probabilities that are not finite")
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if greedy else logprobs  # SGLang reports those of temperature 1 for greedy requests
        self.versions += [version] * len(tokens)
        return self._reason(meta.get("finish_reason") or {})

    def _reason(self, finish: Mapping[str, Any]) -> FinishReason:
        kind = finish.get("type")
        if kind == "abort" and not self.aborted and finish.get("status_code"):
            raise EngineFailure(f"SGLang ended request {self.request.id}: {finish.get('message')}")
        try:
            return FinishReason(str(kind))
        except ValueError as error:
            raise EngineFailure(f"SGLang ended request {self.request.id} with an unknown reason {finish!r:.200}") from error

    def cut(self, count: int) -> None:
        """Keeps this many tokens."""
        del self.tokens[count:], self.logprobs[count:], self.versions[count:]

    def generation(self, finish: FinishReason) -> Generation:
        return Generation(
            id=self.request.id,
            tokens_T=np.array(self.tokens, np.int32),
            logprobs_T=np.array(self.logprobs, np.float32),
            versions_T=np.array(self.versions, np.int32),
            finish=finish,
        )
