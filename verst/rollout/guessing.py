"""A game that needs no data: the environment thinks of a number, the model guesses, the answers are "higher" and "lower"."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from verst.types import Completion, Message, Prompt, Reply

_NUMBER = re.compile(r"(?<![0-9])-?[0-9]{1,18}(?![0-9])")


class Guessing:
    """Thinks of a whole number and says after each guess whether it is higher or lower.

    The number is the prompt's field `field`, or else follows from the prompt's id, so that all trajectories of a group have the same one.
    The rules are added to the last message of the prompt. The guess is the last whole number of a completion; one without a number uses up
    a turn and is told so. `info` has `guesses` (numbers that were guessed) and `solved`.

    Args:
        low, high: the number lies between them, both included.
        max_guesses: completions a trajectory may have (`rollout.max_turns` must allow as many).
        field: the prompt's field that holds the number, if it has one. `start` raises `ValueError` for one that is no whole number or lies
            outside.
    """

    def __init__(self, low: int = 1, high: int = 100, max_guesses: int = 8, field: str = "number") -> None:
        for name, value in (("low", low), ("high", high), ("max_guesses", max_guesses)):
            if not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}, not a whole number")
        if low > high:
            raise ValueError(f"low is {low} and high is {high}; low must not be above high")
        if max_guesses < 1:
            raise ValueError(f"max_guesses is {max_guesses}; a trajectory needs at least one")
        self.turns = max_guesses
        self._low, self._high, self._field = low, high, field
        self._left = max_guesses
        self._guesses = 0
        self._number = low

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        self._number = self._thought_of(prompt)
        *before, last = prompt.messages
        rules = (
            f"I have thought of a whole number from {self._low} to {self._high}. Guess it in at most {self.turns} tries: "
            "I answer whether it is higher or lower than your guess. Say one number each time."
        )
        return (*before, replace(last, content=f"{last.content}\n{rules}"))

    async def reply(self, completion: Completion) -> Reply:
        self._left -= 1
        found = _NUMBER.findall(completion.text)
        guess = int(found[-1]) if found else None
        self._guesses += bool(found)
        solved = guess == self._number
        done = solved or not self._left
        return Reply(() if done else (self._answer(guess),), done, {"guesses": self._guesses, "solved": solved})

    def _answer(self, guess: int | None) -> Message:
        if guess is None:
            return Message("user", f"I found no number in that. Guess a whole number from {self._low} to {self._high}.")
        return Message("user", "higher" if guess < self._number else "lower")

    def _thought_of(self, prompt: Prompt) -> int:
        given = prompt.fields.get(self._field)
        if given is None:
            digest = hashlib.blake2b(prompt.id.encode(), digest_size=8).digest()
            return self._low + int.from_bytes(digest, "little") % (self._high - self._low + 1)
        if isinstance(given, bool) or not _NUMBER.fullmatch(str(given).strip()) or not self._low <= int(given) <= self._high:
            raise ValueError(
                f"field {self._field!r} of prompt {prompt.id} is {given!r}, not a whole number from {self._low} to {self._high}"
            )
        return int(given)
