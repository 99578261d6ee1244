"""The running sequences as arrays with one entry, or row, for each slot, so that a step's bookkeeping is array arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from verst.types import FinishReason, GenerateRequest, Generation

_NO_TOKEN = -1


class SlotTable:
    """S slots of at most `max_tokens` tokens. `length_S` counts a sequence's tokens, the prompt and the newest included."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.slots, self.max_tokens = slots, max_tokens
        self.requests: list[GenerateRequest | None] = [None] * slots
        self.active_S = np.zeros(slots, np.bool_)
        self.length_S = np.zeros(slots, np.int64)
        self.limit_S = np.zeros(slots, np.int64)
        self.seed_S = np.zeros(slots, np.uint64)
        self.temperature_S = np.ones(slots, np.float64)  # of which the trainer, too, takes the reciprocal before rounding
        self.top_p_S = np.ones(slots, np.float32)
        self.top_k_S = np.zeros(slots, np.int64)
        self.min_p_S = np.zeros(slots, np.float32)
        self.has_stop_strings_S = np.zeros(slots, np.bool_)
        self.stop_ids_SK = np.full((slots, 1), _NO_TOKEN, np.int64)
        self.newest_S = np.zeros(slots, np.int64)
        # Of generated tokens only, so a column is a token's position in the generation.
        self.tokens_ST = np.zeros((slots, max_tokens), np.int32)
        self.logprobs_ST = np.zeros((slots, max_tokens), np.float32)
        self.versions_ST = np.zeros((slots, max_tokens), np.int32)
        self.generated_S = np.zeros(slots, np.int64)

    def admit(self, slot: int, request: GenerateRequest, stop_ids: Sequence[int]) -> None:
        """Puts a request into a free slot. `stop_ids` are all of its stop tokens."""
        sampling, prompt_tokens = request.sampling, len(request.tokens_T)
        self.requests[slot] = request
        self.active_S[slot] = True
        self.length_S[slot] = prompt_tokens
        self.generated_S[slot] = 0
        self.limit_S[slot] = min(prompt_tokens + sampling.max_new_tokens, self.max_tokens)
        self.seed_S[slot] = request.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.temperature_S[slot] = sampling.temperature
        self.top_p_S[slot], self.top_k_S[slot], self.min_p_S[slot] = sampling.top_p, sampling.top_k, sampling.min_p
        self.has_stop_strings_S[slot] = bool(sampling.stop)
        if (width := len(stop_ids) - self.stop_ids_SK.shape[1]) > 0:
            self.stop_ids_SK = np.pad(self.stop_ids_SK, ((0, 0), (0, width)), constant_values=_NO_TOKEN)
        self.stop_ids_SK[slot] = _NO_TOKEN
        self.stop_ids_SK[slot, : len(stop_ids)] = stop_ids

    def record(self, active: NDArray[np.intp], tokens: NDArray[np.int64], logprobs: NDArray[np.float32], version: int) -> None:
        """Appends one token to each of the slots `active`."""
        column = self.generated_S[active]
        self.tokens_ST[active, column] = tokens
        self.logprobs_ST[active, column] = logprobs
        self.versions_ST[active, column] = version
        self.newest_S[active] = tokens
        self.generated_S[active] += 1
        self.length_S[active] += 1

    def stopped(self, active: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which of these slots' newest tokens are stop tokens of theirs."""
        return (self.stop_ids_SK[active] == self.newest_S[active, None]).any(1)

    def free(self, slot: int) -> None:
        self.requests[slot] = None
        self.active_S[slot] = False

    def generation(self, slot: int, reason: FinishReason) -> Generation:
        """What the slot has generated, as copies."""
        request, count = self.requests[slot], self.generated_S[slot]
        assert request is not None
        return Generation(
            id=request.id,
            tokens_T=self.tokens_ST[slot, :count].copy(),
            logprobs_T=self.logprobs_ST[slot, :count].copy(),
            versions_T=self.versions_ST[slot, :count].copy(),
            finish=reason,
        )

    def move(self, source: int, target: int) -> None:
        """Moves a sequence to a free slot."""
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array[target] = array[source]
        self.requests[target], self.requests[source] = self.requests[source], None
        self.active_S[source] = False
