"""One trajectory as its agent sees it: a conversation that it asks the policy to continue."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from verst.errors import VerstError
from verst.types import Completion, Message


class SessionRefused(VerstError):
    """A call that the session cannot answer; the message says why."""


class Session:
    """One trajectory, as its agent sees it: by `complete`, or by any client that knows `base_url` and `api_key`.

    The key is good for this trajectory, until it ends.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url, self.api_key = base_url, api_key
        self._heard: list[Message] = []  # the whole conversation, with the policy's last word
        self._asked: asyncio.Queue[tuple[Message, ...]] = asyncio.Queue()
        self._messages: tuple[Message, ...] = ()  # of the last call
        self._answer: asyncio.Future[Completion] | None = None
        self._over = False
        self.not_heeded: set[str] = set()
        """Parameters of its calls that would have changed how tokens are sampled."""

    async def complete(self, messages: Sequence[Message | Mapping[str, str]], *, again: bool = False) -> Completion:
        """What the policy says to a conversation, which must be the one before, its answer, and something new.

        `again`: a client repeats a call whose answer it did not get; it is given that answer.

        Raises `SessionRefused`.
        """
        asked = tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages)
        if self._over:
            raise SessionRefused("this trajectory has ended: a session is good for one")
        if self._answer is not None and again and asked == self._messages:
            return await asyncio.shield(self._answer)
        if self._answer is not None and not self._answer.done():
            raise SessionRefused("the answer to the call before is still being generated: a session is one conversation")
        new = self._new(asked)
        self._messages, self._answer = asked, asyncio.get_running_loop().create_future()
        self._heard += new
        self._asked.put_nowait(new)
        return await asyncio.shield(self._answer)

    async def asked(self) -> tuple[Message, ...]:
        """The new messages of the agent's next call."""
        return await self._asked.get()

    def answer(self, completion: Completion) -> None:
        assert self._answer is not None, "asked() comes first"
        self._heard.append(Message("assistant", completion.text))
        self._answer.set_result(completion)

    def end(self) -> None:
        """Whoever waits for an answer, and whoever asks from here on, is refused."""
        self._over = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(SessionRefused("this trajectory has ended"))
            self._answer.exception()  # seen: nobody may be waiting

    def _new(self, asked: tuple[Message, ...]) -> tuple[Message, ...]:
        """What a call adds to the conversation. Raises `SessionRefused` if it does not continue it."""
        for number, (before, now) in enumerate(zip(self._heard, asked, strict=False)):
            # Agents strip and keep what they were told; the tokens stay those that were sampled.
            if before.role != now.role or before.content.strip() != now.content.strip():
                raise SessionRefused(
                    f"message {number} is {_shown(now)}, but in this session it was {_shown(before)}: a session is one conversation that "
                    "grows, whose earlier messages stay as they were"
                )
        new = asked[len(self._heard) :]
        if not new or new[-1].role == "assistant":
            raise SessionRefused("there is nothing new to answer: the conversation must go on after the last answer, with another role")
        if self._heard and any(message.role == "assistant" for message in new):
            raise SessionRefused("only the policy speaks as the assistant: a new message has that role")
        return new


def _shown(message: Message) -> str:
    return f"{message.role} {message.content[:40]!r}"
