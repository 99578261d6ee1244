"""One trajectory as its agent sees it: conversations that it asks the policy to continue.

Calls are a tree. One goes on behind the answer that ends the longest conversation it begins with, or it opens a conversation. So to append
to a conversation, to go on from an earlier place of it, and to ask the same twice are one thing: who knows which answer a call stands
behind knows its tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from verst.config.text import is_unicode
from verst.data.call_forms import CallForm, Malformed, ToolCall, Tools
from verst.errors import VerstError
from verst.rollout.tool_calls import split_calls
from verst.rollout.user_loop import across
from verst.types import Completion, FinishReason, Message

ENDED = "this trajectory has ended: a session is good for one"
FULL = "this model's maximum context length is used up: the conversation, or the answer before, has reached the run's limit of tokens"
"""Agents know its first words from other servers, and end in order, or go on with fewer messages."""


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

    def message(self, form: CallForm) -> Message:
        """As the policy reads it: calls stand in the text, as the chat templates that tell of tools write them."""
        return Message(self.role, form.write(self.content, [call for _, call in self.calls]))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy generated, and how it is told to the agent. `malformed`: it was meant to call a tool, and is told as text."""

    completion: Completion
    said: Said
    prompt_tokens: int
    """Those before it in its conversation."""
    malformed: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """What an agent says behind an answer of the policy, or to open a conversation."""

    asked: tuple[Said, ...]
    """The whole conversation."""
    behind: Call | None
    """The call whose answer it goes on from."""
    tools: Tools
    """What the policy is told that it can call, in OpenAI's form. They stand in the opening."""
    splits: bool
    """Whether what the policy calls is taken out of its text."""
    future: asyncio.Future[Answer]
    answer: Answer | None = None
    followed: bool = False
    """Whether another call goes on from its answer."""
    repeats: int = 0

    @property
    def cut(self) -> bool:
        """Whether its answer was cut by a limit of tokens."""
        return self.answer is not None and self.answer.completion.finish is FinishReason.LENGTH

    @property
    def new(self) -> tuple[Said, ...]:
        """What stands behind the answer that it goes on from."""
        return self.asked[0 if self.behind is None else len(self.behind.asked) + 1 :]

    def begins(self, asked: Sequence[Said]) -> bool:
        """Whether a conversation goes on from its answer. What stands before `new` is known to be the same, and the tools are."""
        end = len(self.asked)
        if self.answer is None or len(asked) <= end:
            return False
        return asked[end].means(self.answer.said) and all(map(Said.means, asked[end - len(self.new) : end], self.new))


class Session:
    """One trajectory, as its agent sees it: by `complete`, or by any client that knows `base_url` and `api_key`.

    The key is good for this trajectory, until it ends. It belongs to the loop that makes it; `complete` may be called from any.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url, self.api_key = base_url, api_key
        self._home = asyncio.get_running_loop()
        self._calls: list[Call] = []  # that were answered or wait for it: others cannot be gone on from
        self._waiting: asyncio.Queue[Call] = asyncio.Queue()
        self._over = False
        self.malformed = 0
        """Answers that were meant to call a tool, and could not be read."""
        self.not_heeded: set[str] = set()
        """Parameters of its calls that would have changed how tokens are sampled."""

    async def complete(self, messages: Sequence[Message | Mapping[str, str]], *, tools: Tools = (), again: bool = False) -> Completion:
        """What the policy says to a conversation, which may be a new one, or go on from any of its answers. Calls may be made at once.

        `tools`: what it may call, in OpenAI's form. `again`: a client repeats a call whose answer it did not get; it is given that answer.

        Raises `SessionRefused`.
        """
        asked = [Said(m.role, m.content) if isinstance(m, Message) else Said(m["role"], m["content"]) for m in messages]
        return (await across(self.ask(asked, tools=tools, calls=False, again=again), self._home)).completion

    async def ask(self, messages: Sequence[Said], *, tools: Tools, calls: bool, again: bool) -> Answer:
        """As `complete`. `calls`: whether what the policy calls is taken out of its text."""
        asked = tuple(messages)
        if self._over:
            raise SessionRefused(ENDED)
        call = self._repeated(asked, tuple(tools)) if again else None
        if call is None:
            call = self._take(asked, tuple(tools), calls)
        return await asyncio.shield(call.future)

    # ---- the other side

    async def asked(self) -> Call:
        """The agent's next call, in the order of their arrival."""
        return await self._waiting.get()

    def answer(self, call: Call, turn: int, completion: Completion, prompt_tokens: int, form: CallForm) -> None:
        """`turn`: the number of the answer in the trajectory, which makes ids of calls different. `prompt_tokens`: those before it.

        `form`: how the policy calls tools.
        """
        call.answer = _told(completion, call, turn, prompt_tokens, form)
        self.malformed += call.answer.malformed
        call.future.set_result(call.answer)

    def refuse(self, call: Call, reason: str) -> None:
        self._calls.remove(call)
        call.future.set_exception(SessionRefused(reason))
        call.future.exception()  # seen: nobody may be waiting

    def end(self) -> None:
        """Whoever waits for an answer, and whoever asks from here on, is refused."""
        self._over = True
        for call in tuple(self._calls):
            if not call.future.done():
                self.refuse(call, ENDED)

    # ---- inside

    def _take(self, asked: tuple[Said, ...], tools: Tools, splits: bool) -> Call:
        """Raises `SessionRefused` if there is nothing to answer."""
        if not asked or asked[-1].role == "assistant":
            raise SessionRefused("there is nothing new to answer: the last message must be of another role than the assistant's")
        if any(said.calls and said.role != "assistant" for said in asked):
            raise SessionRefused("only the assistant calls tools: a message of another role has tool_calls")
        texts = [text for said in asked for text in (said.role, said.content, *(word for _, call in said.calls for word in astuple(call)))]
        if not all(map(is_unicode, (*texts, json.dumps(tools, ensure_ascii=False)))):  # JSON has halves as escapes
            raise SessionRefused("a message or a tool has half of a surrogate pair, which no tokenizer takes")
        behind = self._behind(asked, tools)
        call = Call(_shared(asked, behind), behind, tools, splits and bool(tools), asyncio.get_running_loop().create_future())
        if behind is not None:
            behind.followed = True
        self._calls.append(call)
        self._waiting.put_nowait(call)
        return call

    def _behind(self, asked: Sequence[Said], tools: Tools) -> Call | None:
        """The call with whose answer the longest known beginning of a conversation ends. Of several, one that nothing follows yet."""
        found: list[Call] = []
        for call in self._calls:  # each comes after the one that it stands behind
            if (call.tools == tools if call.behind is None else call.behind in found) and call.begins(asked):
                found.append(call)
        return max(found, key=lambda call: (len(call.asked), not call.cut, not call.followed), default=None)

    def _repeated(self, asked: tuple[Said, ...], tools: Tools) -> Call | None:
        """The call that a client repeats. Where several said the same, each is repeated before one is repeated twice."""
        same = [call for call in self._calls if call.asked == asked and call.tools == tools]
        call = min(same, key=lambda call: call.repeats, default=None)
        if call is not None:
            call.repeats += 1
        return call


def _shared(asked: tuple[Said, ...], behind: Call | None) -> tuple[Said, ...]:
    """The same messages. Those that stand in the call before are that one's own, so that a long conversation is kept once."""
    if behind is None or behind.answer is None:
        return asked
    known = (*behind.asked, behind.answer.said)
    return tuple(old if old == said else said for old, said in zip(known, asked, strict=False)) + asked[len(known) :]


def _told(completion: Completion, call: Call, turn: int, prompt_tokens: int, form: CallForm) -> Answer:
    found = split_calls(completion.text, form, call.tools) if call.splits else (completion.text, ())
    if isinstance(found, Malformed):
        return Answer(completion, Said("assistant", completion.text), prompt_tokens, malformed=True)
    text, calls = found
    named = tuple((f"call_{turn}_{number}", made) for number, made in enumerate(calls))
    return Answer(completion, Said("assistant", text, named), prompt_tokens)


def _same_call(one: tuple[str, ToolCall], other: tuple[str, ToolCall]) -> bool:
    (id_one, call_one), (id_other, call_other) = one, other
    return (id_one, call_one.name) == (id_other, call_other.name) and _same_json(call_one.arguments, call_other.arguments)


def _same_json(one: str, other: str) -> bool:
    try:
        return one == other or json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False
