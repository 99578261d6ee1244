"""Rollout functions: `rollout.environment: rollout:module:function`. Each writes one trajectory, token by token.

An environment answers the policy in messages; a rollout function asks it in tokens. Here one becomes the other: what the function adds
between two completions is the environment's reply. So seeds, deadlines, recorded pieces and routes are those of all trajectories, and an
engine's failure never passes through a user's `except`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from verst import extend
from verst.errors import ExtensionError
from verst.rollout.tokens import Asked, Rolling, TokenSession
from verst.rollout.user_loop import Caller, UserLoop
from verst.types import Completion, Prompt, Reply

SIGNATURE = ("session", "prompt")
EXPECTED = "async def rollout(session, prompt, **options) -> mapping or None"


class Rollouts:
    """Makes the environment of each trajectory of a rollout function, `async fn(session, prompt, **options)`.

    What it returns, a mapping or None, is the trajectory's `info`. Raises `ExtensionError` with the signature expected.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        extend.check_callable(function, "rollout", SIGNATURE, options)
        if not extend.is_async(function):
            name = getattr(function, "__qualname__", type(function).__qualname__)
            raise ExtensionError(f"rollout {name} is no `async def`, so nothing could end it; expected: {EXPECTED}")
        self.function, self.options = function, options
        self.title = f"rollout {getattr(function, '__qualname__', type(function).__qualname__)}"
        """By which messages name it."""

    def bound(self, rolling: Rolling, users: UserLoop, caller: Caller) -> Callable[[], Any]:
        """What makes a `RolloutEnvironment`, for a run that rolls so and a trajectory whose function is called by `caller`."""
        return _Bound(self, rolling, users, caller)


class _Bound:
    """Makes environments under the name of their function."""

    def __init__(self, rollouts: Rollouts, rolling: Rolling, users: UserLoop, caller: Caller) -> None:
        self.title = rollouts.title
        self._rollouts, self._rolling = rollouts, rolling
        self._users, self._caller = users, caller

    def __call__(self) -> RolloutEnvironment:
        return RolloutEnvironment(self._rollouts, TokenSession(self._rolling), self._users, self._caller)


class RolloutEnvironment:
    """One trajectory of a rollout function, as an environment whose messages are tokens. Only the function is in the users' loop."""

    def __init__(self, rollouts: Rollouts, session: TokenSession, users: UserLoop, caller: Caller) -> None:
        self._rollouts, self._session = rollouts, session
        self._users, self._caller = users, caller
        self._function: asyncio.Task[Any] | None = None

    async def start(self, prompt: Prompt) -> Asked:
        call = partial(self._rollouts.function, self._session, prompt, **self._rollouts.options)
        self._function = asyncio.create_task(self._users.run(call, self._caller))
        asked = await self._next()
        if asked is None:
            raise RuntimeError("the rollout ended without asking for a completion")
        return asked

    async def reply(self, completion: Completion) -> Reply:
        assert self._function is not None, "start() comes first"
        self._session.answer(completion)
        asked = await self._next()
        if asked is not None:
            return asked
        returned = self._function.result()
        if not isinstance(returned, Mapping | None):
            raise TypeError(f"the rollout returned {extend.described(returned)}, not a mapping or None")
        return self._session.ended(dict(returned or {}))

    async def close(self) -> None:
        self._session.end()
        for close in self._session.at_end:  # first: the function may be one that nobody can end
            await close()
        if self._function is not None and not self._function.done():
            self._function.cancel()
            await asyncio.wait({self._function})
        if self._function is not None and not self._function.cancelled():
            self._function.exception()  # seen: it has been reported, or came of the end

    async def _next(self) -> Asked | None:
        """What it asks for next; None if it has ended. Raises what it raised."""
        assert self._function is not None
        asking = asyncio.ensure_future(self._session.asked())
        try:
            await asyncio.wait({asking, self._function}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            self._function.result()
            return None
        finally:
            asking.cancel()
