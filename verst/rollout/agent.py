"""Agents that ask for completions themselves: `rollout.environment: agent:module:function`.

An environment answers the policy; an agent asks it. Here one becomes the other: what an agent adds to its conversation between two
completions is the environment's reply. So its trajectories are token in, token out like all others: of each call only the new messages are
rendered, and what the policy said stays the tokens that it sampled. Tools of its calls are told to the policy by the chat template, and
what it calls is told to the agent apart from its text.

A trajectory is one conversation that grows. A call that does not continue it is refused: the agent sees an error, and the trajectory, if it
does not go on, has failed with the reason.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from verst import extend
from verst.rollout.endpoint import Endpoint
from verst.rollout.sessions import FULL, Session
from verst.types import Completion, FinishReason, Message, Prompt, Reply

SIGNATURE = ("session", "prompt")
_ORDERLY_S = 30.0
"""For what an agent has to do once its answer was cut, such as scoring. One that goes on is ended, as after its last turn."""


class Agents:
    """Makes the environment of each trajectory of an agent, `fn(session, prompt, **options)`, plain or async.

    What it returns, a mapping or None, is the trajectory's `info`. A plain function runs in a thread, which nobody can end: once its
    trajectory is over, each of its calls is refused. `close` ends the endpoint that they all share. An object with `__call__` may have
    `check_machine()`, called once in each replica, and a plain `close()`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        extend.check_callable(function, "agent", SIGNATURE, options)
        self.function, self.options = function, options
        self._endpoint: Endpoint | None = None
        self._starting = asyncio.Lock()

    def __call__(self) -> AgentEnvironment:
        return AgentEnvironment(self)

    def check_machine(self) -> None:
        """That of the function, if it is an object that has one. Raises `ExtensionError`."""
        getattr(self.function, "check_machine", lambda: None)()

    async def open(self) -> Session:
        """A new session, which the endpoint knows."""
        async with self._starting:
            if self._endpoint is None:
                self._endpoint = await Endpoint.start()
        session = Session(self._endpoint.url, secrets.token_urlsafe(24))
        self._endpoint.add(session)
        return session

    def forget(self, session: Session) -> None:
        session.end()
        if self._endpoint is not None:
            self._endpoint.remove(session)

    async def close(self) -> None:
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            await endpoint.close()
        getattr(self.function, "close", lambda: None)()


class AgentEnvironment:
    """One trajectory of an agent, as an environment."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents
        self._session: Session | None = None
        self._agent: asyncio.Future[Any] | None = None

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """What the agent said that the policy can call, once it has started."""
        return () if self._session is None else self._session.tools

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        agents = self._agents
        self._session = session = await agents.open()
        call = partial(agents.function, session, prompt, **agents.options)
        self._agent = asyncio.ensure_future(call() if extend.is_async(agents.function) else asyncio.to_thread(call))
        new = await self._next()
        if new is None:
            raise RuntimeError("the agent ended without asking for a completion")
        return new

    async def reply(self, completion: Completion) -> Reply:
        assert self._session is not None, "start() comes first"
        assert self._agent is not None
        self._session.answer(completion)
        new = await self._next()
        if new is not None and completion.finish is not FinishReason.LENGTH:
            return Reply(new, done=False)
        if new is not None and not await self._ends_in_order():
            return Reply(info=self._noted())
        returned = self._agent.result()
        if not isinstance(returned, Mapping | None):
            raise TypeError(f"the agent returned {returned!r} of type {type(returned).__name__}, not a mapping or None")
        return Reply(info={**(returned or {}), **self._noted()})

    async def close(self) -> None:
        if self._session is not None:
            self._agents.forget(self._session)
        if self._agent is not None and not self._agent.done():
            self._agent.cancel()
            await asyncio.wait({self._agent})
        if self._agent is not None and not self._agent.cancelled():
            self._agent.exception()  # seen: it has been reported, or came of the end

    def _noted(self) -> dict[str, Any]:
        """What the session has to say of its calls."""
        assert self._session is not None
        noted = {"not_heeded": sorted(self._session.not_heeded), "malformed_calls": self._session.malformed}
        return {name: value for name, value in noted.items() if value}

    async def _ends_in_order(self) -> bool:
        """The agent asks on after an answer that ends its trajectory. It is refused, and may still say what came of it."""
        assert self._session is not None
        assert self._agent is not None
        self._session.end(FULL)
        ended, _ = await asyncio.wait({self._agent}, timeout=_ORDERLY_S)
        return bool(ended) and self._agent.exception() is None

    async def _next(self) -> tuple[Message, ...] | None:
        """The new messages of its next call; None if it has ended. Raises what it raised."""
        assert self._session is not None
        assert self._agent is not None
        asking = asyncio.ensure_future(self._session.asked())
        try:
            await asyncio.wait({asking, self._agent}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            self._agent.result()
            return None
        finally:
            asking.cancel()
