"""A conversation while it grows: token arrays that stay exact, turn by turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import EnvironmentFailure
from verst.rollout.fields import GivenFields
from verst.routing.records import routes_of
from verst.types import NO_VERSION, Branch, FinishReason, Generation, Message, Routes, Status, Trajectory, Turn

Columns = tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32], NDArray[np.int32]]
"""`[T]` tokens, loss mask, log-probabilities, versions."""


class Transcript:
    """Collects given and generated tokens with their mask, behaviour log-probabilities, versions and routes.

    Most trajectories are one conversation. Those of agents may be several, each with a transcript of its own.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.info: dict[str, Any] = {}
        self.fields = GivenFields()
        self.turns: list[Turn] = []
        self.length = 0
        self.closed = False
        """Whether it ends with its last turn, so that nothing waits for an answer."""
        self.routed = 0
        """Tokens whose routes are known. Later requests have them processed again, but it is the first pass that sampled what follows."""
        self._tokens: list[NDArray[np.int32]] = []
        self._mask: list[NDArray[np.bool_]] = []
        self._logprobs: list[NDArray[np.float32]] = []
        self._versions: list[NDArray[np.int32]] = []
        self._experts: list[NDArray[Any]] = []
        self._heard: list[int] = []  # messages up to the end of each turn
        self._turn_start = 0
        self._generated_from = 0

    def tokens(self) -> NDArray[np.int32]:
        """`[T]` everything so far: what the next request is given."""
        return np.concatenate([np.zeros(0, np.int32), *self._tokens])

    def give(self, tokens_T: NDArray[np.int32], messages: Sequence[Message]) -> None:
        """Opens a turn with tokens that nobody sampled."""
        self._turn_start = self.length
        self.closed = False
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
        self._heard.append(len(self.messages))
        self.closed = True

    def first(self, turns: int, *, given: bool = False) -> Transcript:
        """A copy that ends with turn number `turns` (from 1). `given`: what was sampled counts as given there, since it is trained here."""
        end = self.turns[turns - 1].end
        tokens_T, mask_T, logprobs_T, versions_T = self._columns()
        copy = Transcript()
        if given:
            copy._append(tokens_T[:end], np.zeros(end, np.bool_), np.zeros(end), np.full(end, NO_VERSION))
        else:
            copy._append(tokens_T[:end], mask_T[:end], logprobs_T[:end], versions_T[:end])
        copy.turns, copy._heard = self.turns[:turns], self._heard[:turns]
        copy.messages, copy.closed = self.messages[: copy._heard[-1]], True
        if self._experts:  # but for the last token's: it was no input yet
            copy.route(np.concatenate(self._experts)[: end - 1])
        return copy

    def trajectory(self, name: str, status: Status, seed: int, others: Iterable[Transcript] = ()) -> Trajectory:
        """`others`: further conversations of the trajectory, in the order in which they began. Those with nothing to train are left out."""
        return Trajectory(
            name,
            *self._columns(),
            turns=tuple(self.turns),
            messages=tuple(self.messages),
            status=status,
            seed=seed,
            info=self.info,
            fields=self.fields.now(),
            routes=self._routes(),
            branches=tuple(other._branch() for other in others if other.generated),
        )

    def _branch(self) -> Branch:
        return Branch(*self._columns(), tuple(self.turns), tuple(self.messages), self._routes())

    def _columns(self) -> Columns:
        return (
            self.tokens(),
            np.concatenate([np.zeros(0, np.bool_), *self._mask]),
            np.concatenate([np.zeros(0, np.float32), *self._logprobs]),
            np.concatenate([np.zeros(0, np.int32), *self._versions]),
        )

    def _routes(self) -> Routes | None:
        return routes_of(self.tokens(), np.concatenate(self._experts)) if self._experts else None

    def _append(self, tokens_T: NDArray[Any], mask_T: NDArray[np.bool_], logprobs_T: NDArray[Any], versions_T: NDArray[Any]) -> None:
        self._tokens.append(tokens_T.astype(np.int32))
        self._mask.append(mask_T)
        self._logprobs.append(logprobs_T.astype(np.float32))
        self._versions.append(versions_T.astype(np.int32))
        self.length += len(tokens_T)
