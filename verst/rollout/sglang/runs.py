"""One generation on its way: what it has so far, and the request to the server that fetches more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import EngineFailure, RoutesRefused
from verst.rollout.sglang.filters import filters, request_fields
from verst.rollout.sglang.routes import RouteReader
from verst.types import FinishReason, GenerateRequest, Generation

STOP_STRING_TOKENS = 32
"""Tokens asked for at once when stop strings are looked for between: SGLang knows no text, because it has no tokenizer."""


@dataclass
class Run:
    """A request with the tokens it has so far. The server may be asked several times: after a pause, and between stop strings."""

    request: GenerateRequest
    limit: int  # new tokens
    nonce: str  # of the engine
    cached_under: int  # the version whose keys and values it may use
    reader: RouteReader | None = None  # of an engine that records routes
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    experts: list[NDArray[Any]] = field(default_factory=list)  # rows of `request.routes_from` and the tokens after it
    aborted: bool = False
    server_id: str | None = None  # while the server works on it
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when something happened that a waiting run must see

    @property
    def input_tokens(self) -> int:
        """Of the next question."""
        return len(self.request.tokens_T) + len(self.tokens)

    @property
    def routed(self) -> bool:
        return self.reader is not None and self.request.routes_from is not None

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
        extra: dict[str, Any] = RouteReader.fields(self._first_row) if self.routed else {}
        if filters(sampling):
            fields, parameters["custom_params"] = request_fields(sampling)
            extra |= fields
        return {**self._question(server_id), "sampling_params": parameters, "return_logprob": True, **extra}

    def newest_body(self, server_id: str) -> dict[str, Any]:
        """A question for nothing but the routes of the newest token; see `needs_newest`."""
        parameters = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        return {**self._question(server_id), "sampling_params": parameters, **RouteReader.fields(self.input_tokens - 1)}

    def needs_newest(self, version: int) -> bool:
        """Whether the next answer could have the routes of its newest input token from a pass of another version.

        The server computes that token, and samples from what it computed; but if another request left the same tokens in the prefix cache,
        it goes on from the keys, values and routes that it finds there. They are of another version if the weights have changed since the
        run's first token. A request that ends with its first token is answered before the server looks there.
        """
        return self.routed and bool(self.tokens) and version != self.cached_under

    def take(self, answer: Mapping[str, Any], version: int, newest_LK: NDArray[Any] | None = None) -> FinishReason:
        """Adds what the server generated, all with one version; `newest_LK`: the routes of the newest token, if it was asked for them.

        Raises `EngineFailure` if the answer does not hold together, `RoutesRefused` if its routes are not those of its tokens.
        """
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
        reason = self._reason(meta.get("finish_reason") or {})
        if self.routed and tokens:
            rows = self._rows(meta, self._first_row, len(tokens))
            if newest_LK is not None:
                rows[0] = newest_LK
            self.experts.append(rows)
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if greedy else logprobs  # SGLang reports those of temperature 1 for greedy requests
        self.versions += [version] * len(tokens)
        return reason

    def newest_row(self, answer: Mapping[str, Any]) -> NDArray[Any] | None:
        """[L, K] from the answer to `newest_body`; None if it was ended before its pass."""
        self._reason(answer["meta_info"].get("finish_reason") or {})
        tokens = len(answer["output_ids"])
        return self._rows(answer["meta_info"], self.input_tokens - 1, tokens)[0] if tokens else None

    @property
    def _first_row(self) -> int:
        """The first token whose routes are not known: of the others the first pass counts, which sampled the token after each."""
        assert self.request.routes_from is not None
        return self.request.routes_from + sum(map(len, self.experts))

    def _rows(self, meta: Mapping[str, Any], start: int, new_tokens: int) -> NDArray[Any]:
        assert self.reader is not None
        try:
            return self.reader.rows(meta, start, self.input_tokens + new_tokens - 1)
        except RoutesRefused as refused:
            raise RoutesRefused(f"request {self.request.id}: {refused}") from refused

    def _question(self, server_id: str) -> dict[str, Any]:
        return {
            "rid": server_id,
            "input_ids": [*self.request.tokens_T.tolist(), *self.tokens],
            "extra_key": f"{self.nonce}:{self.cached_under}",
        }

    def _reason(self, finish: Mapping[str, Any]) -> FinishReason:
        kind = finish.get("type")
        if kind == "abort" and not self.aborted and finish.get("status_code"):
            raise EngineFailure(f"SGLang ended request {self.request.id}: {finish.get('message')}")
        try:
            return FinishReason(str(kind))
        except ValueError as error:
            raise EngineFailure(f"SGLang ended request {self.request.id} with an unknown reason {finish!r:.200}") from error

    def cut(self, count: int) -> None:
        """Keeps this many tokens, and the routes of all of them but the newest."""
        del self.tokens[count:], self.logprobs[count:], self.versions[count:]
        if self.experts and self.request.routes_from is not None:
            self.experts = [np.concatenate(self.experts)[: self.input_tokens - 1 - self.request.routes_from]]

    def generation(self, finish: FinishReason) -> Generation:
        return Generation(
            id=self.request.id,
            tokens_T=np.array(self.tokens, np.int32),
            logprobs_T=np.array(self.logprobs, np.float32),
            versions_T=np.array(self.versions, np.int32),
            finish=finish,
            experts_RLK=np.concatenate(self.experts) if self.experts else None,
        )
