"""One trajectory as its rollout function sees it: a sequence of tokens that grows, by what the function gives and the policy generates.

The function hands over the whole sequence each time. What the policy generated before must be in it, token by token, so a text that was
decoded and tokenised anew is noticed. Tokens that the function adds are given: nobody sampled them, and nothing is trained on them.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.config.text import is_unicode
from verst.data.chat import ChatRenderer
from verst.data.prompts import same_beginning
from verst.rollout.sessions import SessionRefused
from verst.rollout.user_loop import across
from verst.types import Completion, Message, Reply, Sampling

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Asked(Reply):
    """What a rollout function wants continued: `tokens` come behind the sequence so far. None: as the run says."""

    tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    excluded: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended(Reply):
    """A rollout function has returned. `truncated`: whether a limit ended it; None: whether one ended its last generation."""

    truncated: bool | None = None
    excluded: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Rolling:
    """What a rollout function may know of the run that rolls it."""

    renderer: ChatRenderer
    sampling: Sampling
    max_turns: int
    max_model_tokens: int
    group_size: int = 1


class TokenSession:
    """One trajectory, until its function returns. It changes in the loop that makes it; its function may be in another."""

    def __init__(self, rolling: Rolling) -> None:
        self.rolling = rolling
        self.home = asyncio.get_running_loop()
        self._tokens: list[int] = []
        self._generated: list[Span] = []
        self._excluded: list[Span] = []
        self._turns = 0
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._answer: asyncio.Future[Completion] | None = None
        self._over = False
        self.truncated: bool | None = None
        """What the function may say of its end; see `Ended`."""
        self.at_end: list[Callable[[], Awaitable[Any]]] = []
        """What is to be closed with the trajectory, in the loop that makes it, whether or not its function ever returns."""

    # ---- what there is

    @property
    def tokens(self) -> list[int]:
        """The sequence so far, a copy: what was given, and what the policy generated."""
        return list(self._tokens)

    @property
    def generated(self) -> tuple[Span, ...]:
        """Where in the sequence the tokens of each completion lie, [start, end)."""
        return tuple(self._generated)

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled, which is the run's to say; `max_new_tokens` is the limit of one completion."""
        return self.rolling.sampling

    @property
    def room(self) -> int:
        """Tokens that still fit in the trajectory, given or generated."""
        return self.rolling.max_model_tokens - len(self._tokens)

    @property
    def turns_left(self) -> int:
        """Completions that it may still have (`rollout.max_turns`); the next one ends the trajectory."""
        return self.rolling.max_turns - self._turns

    # ---- text and tokens

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation by the chat template, up to where the assistant begins to speak."""
        return self.rolling.renderer.opening(messages).tolist()

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that the chat template puts behind the last completion, with new messages, up to where the assistant speaks again.

        Raises `ModelError` for a template that cannot be continued.
        """
        return self.rolling.renderer.continuation(messages, last=self._tokens[-1] if self._tokens else None).tolist()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without any that a tokenizer would put around it. Special tokens in it are special."""
        return list(self.rolling.renderer.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self.rolling.renderer.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # ---- what the function does

    async def generate(self, tokens: Sequence[int], *, max_new_tokens: int | None = None, stop: Sequence[str] | None = None) -> Completion:
        """What the policy says behind `tokens`, which begin with the whole sequence so far (`self.tokens`) and may go on with others.

        Args:
            max_new_tokens: a limit below that of the run. A completion that it ends has `FinishReason.LENGTH`, and may be continued.
            stop: stop strings in place of the run's. The one that matched stays in the completion.

        Raises `SessionRefused`, and leaves all as it was, if the sequence is another one, or it cannot be generated from.
        """
        return await across(self._generate(tokens, max_new_tokens, stop), self.home)

    def exclude(self, start: int, end: int) -> None:
        """Generated tokens of the sequence from `start` up to `end` are not trained: they count as given."""
        if not 0 <= start < end <= len(self._tokens):
            raise SessionRefused(f"exclude({start}, {end}) is no part of a sequence of {len(self._tokens)} tokens")
        self._excluded.append((start, end))

    # ---- the other side

    async def asked(self) -> Asked:
        """The function's next call."""
        return await self._asked.get()

    def answer(self, completion: Completion) -> None:
        assert self._answer is not None, "asked() comes first"
        start = len(self._tokens)
        self._tokens += completion.tokens
        self._generated.append((start, len(self._tokens)))
        self._answer.set_result(completion)

    def ended(self, info: Mapping[str, Any]) -> Ended:
        """What the trajectory ends with."""
        return Ended((), True, info, self.truncated, tuple(self._excluded))

    def end(self) -> None:
        """Whoever waits for a completion, and whoever asks from here on, is refused."""
        self._over = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(SessionRefused("this trajectory has ended"))
            self._answer.exception()  # seen: nobody may be waiting

    # ---- inside

    async def _generate(self, tokens: Sequence[int], max_new_tokens: int | None, stop: Sequence[str] | None) -> Completion:
        given, limit, stops = self._new(tokens), self._limit(max_new_tokens), _stops(stop)
        text = self.decode(given)
        messages = (Message("user", text),) if given else ()
        self._answer = asyncio.get_running_loop().create_future()
        self._tokens += given
        self._turns += 1
        self._asked.put_nowait(Asked(messages, False, {}, given, limit, stops, tuple(self._excluded)))
        return await asyncio.shield(self._answer)

    def _new(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The tokens that come behind the sequence so far. Raises `SessionRefused`."""
        if self._over:
            raise SessionRefused("this trajectory has ended: a session is good for one")
        if self._answer is not None and not self._answer.done():
            raise SessionRefused("the completion before is still being generated: a session is one sequence")
        try:
            asked = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise SessionRefused(f"tokens are to be a list of whole numbers: {error}") from error
        known = self._tokens
        if asked[: len(known)] != known:
            same = same_beginning(asked, known)
            raise SessionRefused(
                f"the tokens differ at place {same} from the {len(known)} that were given and generated so far: hand over the tokens that "
                "were generated, and not their text tokenised anew; begin with session.tokens"
            )
        new = tuple(asked[len(known) :])
        vocabulary = len(self.rolling.renderer.tokenizer)
        if strange := [token for token in new if not 0 <= token < vocabulary]:
            raise SessionRefused(f"{strange[0]} is no token of the vocabulary, which has {vocabulary}")
        if not asked:
            raise SessionRefused("there are no tokens to go on from: give the prompt's, session.opening(prompt.messages)")
        return new

    def _limit(self, max_new_tokens: int | None) -> int | None:
        if max_new_tokens is None:
            return None
        try:
            limit = operator.index(max_new_tokens)
        except TypeError as error:
            raise SessionRefused(f"max_new_tokens is {max_new_tokens!r:.80}: give a whole number") from error
        if limit < 1:
            raise SessionRefused(f"max_new_tokens is {limit}: ask for one token at least")
        return min(limit, self.sampling.max_new_tokens)


def _stops(stop: Sequence[str] | None) -> tuple[str, ...] | None:
    """Stop strings as engines take them. Raises `SessionRefused` here, since an engine that meets another value breaks."""
    if stop is None:
        return None
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise SessionRefused(f"stop is {stop!r:.80}: give a list of texts")
    stops = tuple(stop)
    if strange := [text for text in stops if not (isinstance(text, str) and text and is_unicode(text))]:
        raise SessionRefused(f"stop holds {strange[0]!r:.80}: give texts that are not empty and can be written in UTF-8")
    return tuple(map(str, stops))
