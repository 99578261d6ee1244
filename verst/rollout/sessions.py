"""One trajectory as its agent sees it: a conversation that it asks the policy to continue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.errors import VerstError
from verst.rollout.tool_calls import Malformed, ToolCall, split_calls
from verst.types import Completion, Message

ENDED = "this trajectory has ended: a session is good for one"
FULL = "this model's maximum context length is used up: the answer before was cut by the run's limit of tokens, and ends the trajectory"
"""Agents know its first words from other servers, and end in order."""


class SessionRefused(VerstError):
    """A call that the session cannot answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message as agents see it: calls of tools, by their ids, stand beside the text and not in it."""

    role: str
    content: str
    calls: tuple[tuple[str, ToolCall], ...] = ()

    def means(self, other: Said) -> bool:
        """Whether it is the same message. Agents strip what they were told, and write JSON in their own way."""
        return (
            self.role == other.role
            and self.content.strip() == other.content.strip()
            and len(self.calls) == len(other.calls)
            and all(map(_same_call, self.calls, other.calls))
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy generated, and how it is told to the agent. `malformed`: it was meant to call a tool, and is told as text."""

    completion: Completion
    said: Said
    malformed: bool = False


class Session:
    """One trajectory, as its agent sees it: by `complete`, or by any client that knows `base_url` and `api_key`.

    The key is good for this trajectory, until it ends.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url, self.api_key = base_url, api_key
        self._heard: list[Said] = []  # the whole conversation, with the policy's last word
        self._asked: asyncio.Queue[tuple[Message, ...]] = asyncio.Queue()
        self._messages: tuple[Said, ...] = ()  # of the last call
        self._calls = False
        self._answer: asyncio.Future[Answer] | None = None
        self._over: str | None = None  # why nothing more is answered
        self.tools: tuple[Mapping[str, Any], ...] = ()
        """What the first call said that the policy can call, in OpenAI's form. They are in the opening, so later calls have the same."""
        self.malformed = 0
        """Answers that were meant to call a tool, and could not be read."""
        self.not_heeded: set[str] = set()
        """Parameters of its calls that would have changed how tokens are sampled."""

    async def complete(
        self, messages: Sequence[Message | Mapping[str, str]], *, tools: Sequence[Mapping[str, Any]] = (), again: bool = False
    ) -> Completion:
        """What the policy says to a conversation, which must be the one before, its answer, and something new.

        `tools`: what it may call, in OpenAI's form. `again`: a client repeats a call whose answer it did not get; it is given that answer.

        Raises `SessionRefused`.
        """
        asked = [Said(m.role, m.content) if isinstance(m, Message) else Said(m["role"], m["content"]) for m in messages]
        return (await self.ask(asked, tools=tools, calls=False, again=again)).completion

    async def ask(self, messages: Sequence[Said], *, tools: Sequence[Mapping[str, Any]], calls: bool, again: bool) -> Answer:
        """As `complete`. `calls`: whether what the policy calls is taken out of its text."""
        asked = tuple(messages)
        if self._over is not None:
            raise SessionRefused(self._over)
        if self._answer is not None and again and asked == self._messages:
            return await asyncio.shield(self._answer)
        if self._answer is not None and not self._answer.done():
            raise SessionRefused("the answer to the call before is still being generated: a session is one conversation")
        new = self._new(asked)
        self._take_tools(tools)
        self._messages, self._answer = asked, asyncio.get_running_loop().create_future()
        self._calls = calls and bool(self.tools)
        self._heard += new
        self._asked.put_nowait(tuple(Message(said.role, said.content) for said in new))
        return await asyncio.shield(self._answer)

    async def asked(self) -> tuple[Message, ...]:
        """The new messages of the agent's next call."""
        return await self._asked.get()

    def answer(self, completion: Completion) -> None:
        assert self._answer is not None, "asked() comes first"
        answer = self._told(completion)
        self.malformed += answer.malformed
        self._heard.append(answer.said)
        self._answer.set_result(answer)

    def end(self, reason: str = ENDED) -> None:
        """Whoever waits for an answer, and whoever asks from here on, is refused."""
        self._over = reason
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(SessionRefused(reason))
            self._answer.exception()  # seen: nobody may be waiting

    def _told(self, completion: Completion) -> Answer:
        found = split_calls(completion.text) if self._calls else (completion.text, ())
        if isinstance(found, Malformed):
            return Answer(completion, Said("assistant", completion.text), malformed=True)
        text, calls = found
        named = tuple((f"call_{len(self._messages)}_{number}", call) for number, call in enumerate(calls))
        return Answer(completion, Said("assistant", text, named))

    def _take_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Of the first call. Raises `SessionRefused` if those of another differ."""
        if not self._heard:
            self.tools = tuple(tools)
        elif _text(tools) != _text(self.tools):
            raise SessionRefused(
                "the tools are others than those of the first call: they stand at the beginning of the conversation, which stays as it "
                "was; tool_choice none asks for an answer without calls"
            )

    def _new(self, asked: tuple[Said, ...]) -> tuple[Said, ...]:
        """What a call adds to the conversation. Raises `SessionRefused` if it does not continue it."""
        for number, (before, now) in enumerate(zip(self._heard, asked, strict=False)):
            if not now.means(before):  # the tokens stay those that were sampled
                raise SessionRefused(
                    f"message {number} is {_shown(now)}, but in this session it was {_shown(before)}: a session is one conversation that "
                    "grows, whose earlier messages stay as they were"
                )
        new = asked[len(self._heard) :]
        if not new or new[-1].role == "assistant":
            raise SessionRefused("there is nothing new to answer: the conversation must go on after the last answer, with another role")
        if self._heard and any(said.role == "assistant" for said in new):
            raise SessionRefused("only the policy speaks as the assistant: a new message has that role")
        if any(said.calls for said in new):
            raise SessionRefused("only the policy calls tools: a message that opens the conversation has tool_calls")
        return new


def _same_call(one: tuple[str, ToolCall], other: tuple[str, ToolCall]) -> bool:
    (id_one, call_one), (id_other, call_other) = one, other
    return (id_one, call_one.name) == (id_other, call_other.name) and _same_json(call_one.arguments, call_other.arguments)


def _same_json(one: str, other: str) -> bool:
    try:
        return one == other or json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def _text(tools: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(tools), sort_keys=True)


def _shown(said: Said) -> str:
    calls = f" with calls of {', '.join(call.name for _, call in said.calls)}"[:80] if said.calls else ""
    return f"{said.role} {said.content[:40]!r}{calls}"
