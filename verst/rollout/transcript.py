"""A trajectory while it grows: token arrays that stay exact, turn by turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import EnvironmentFailure
from verst.rollout.fields import GivenFields
from verst.routing.records import routes_of
from verst.types import NO_VERSION, FinishReason, Generation, Message, Status, Trajectory, Turn


class Transcript:
    """Collects given and generated tokens with their mask, behaviour log-probabilities, versions and routes."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.info: dict[str, Any] = {}
        self.fields = GivenFields()
        self.turns: list[Turn] = []
        self.length = 0
        self.routed = 0
        """Tokens whose routes are known. Later requests have them processed again, but it is the first pass that sampled what follows."""
        self._tokens: list[NDArray[np.int32]] = []
        self._mask: list[NDArray[np.bool_]] = []
        self._logprobs: list[NDArray[np.float32]] = []
        self._versions: list[NDArray[np.int32]] = []
        self._experts: list[NDArray[Any]] = []
        self._turn_start = 0
        self._generated_from = 0

    def tokens(self) -> NDArray[np.int32]:
        """`[T]` everything so far: what the next request is given."""
        return np.concatenate([np.zeros(0, np.int32), *self._tokens])

    def give(self, tokens_T: NDArray[np.int32], messages: Sequence[Message]) -> None:
        """Opens a turn with tokens that nobody sampled."""
        self._turn_start = self.length
        self.messages.extend(messages)
        self._append(tokens_T, np.zeros(len(tokens_T), np.bool_), np.zeros(len(tokens_T)), np.full(len(tokens_T), NO_VERSION))
        self._generated_from = self.length

    def generate(self, generation: Generation) -> None:
        """Adds sampled tokens to the open turn. A turn that was interrupted arrives in several pieces."""
        mask = np.ones(len(generation.tokens_T), np.bool_)
        self._append(generation.tokens_T, mask, generation.logprobs_T, generation.versions_T)

    def route(self, experts_RLK: NDArray[Any]) -> None:
        """Adds the routes of the tokens from `routed` on, as a generation returns them."""
        self._experts.append(experts_RLK)
        self.routed += len(experts_RLK)

    @property
    def generated(self) -> int:
        """Tokens that were sampled."""
        return sum(int(mask.sum()) for mask in self._mask)

    def turn(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """`[T]` the generated tokens of the open turn, and their log-probabilities."""
        logprobs_T = np.concatenate([np.zeros(0, np.float32), *self._logprobs])
        return self.tokens()[self._generated_from :], logprobs_T[self._generated_from :]

    def exclude(self, spans: Iterable[tuple[int, int]]) -> None:
        """Tokens that were generated, but are not to be trained, count as given. Repeating it changes nothing."""
        for start, end in spans:
            first = 0
            for mask_T, logprobs_T, versions_T in zip(self._mask, self._logprobs, self._versions, strict=True):
                part = slice(max(start - first, 0), max(end - first, 0))
                mask_T[part], logprobs_T[part], versions_T[part] = False, 0.0, NO_VERSION
                first += len(mask_T)

    def require_trained(self) -> None:
        """Raises `EnvironmentFailure` if there is no token to train."""
        if not self.generated:
            raise EnvironmentFailure("none of the tokens that were generated is left to train: exclude fewer")

    def end_turn(self, text: str, finish: FinishReason) -> None:
        """Closes the turn with its decoded text."""
        self.turns.append(Turn(self._turn_start, self._generated_from, self.length, finish, text))
        self.messages.append(Message("assistant", text))

    def trajectory(self, name: str, status: Status, seed: int) -> Trajectory:
        return Trajectory(
            id=name,
            tokens_T=self.tokens(),
            loss_mask_T=np.concatenate([np.zeros(0, np.bool_), *self._mask]),
            logprobs_T=np.concatenate([np.zeros(0, np.float32), *self._logprobs]),
            versions_T=np.concatenate([np.zeros(0, np.int32), *self._versions]),
            turns=tuple(self.turns),
            messages=tuple(self.messages),
            status=status,
            seed=seed,
            info=self.info,
            fields=self.fields.now(),
            routes=routes_of(self.tokens(), np.concatenate(self._experts)) if self._experts else None,
        )

    def _append(self, tokens_T: NDArray[Any], mask_T: NDArray[np.bool_], logprobs_T: NDArray[Any], versions_T: NDArray[Any]) -> None:
        self._tokens.append(tokens_T.astype(np.int32))
        self._mask.append(mask_T)
        self._logprobs.append(logprobs_T.astype(np.float32))
        self._versions.append(versions_T.astype(np.int32))
        self.length += len(tokens_T)
