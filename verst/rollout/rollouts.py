"""Rollout functions: `rollout.environment: rollout:module:function`. Each writes one trajectory, token by token.

An environment answers the policy in messages, an agent asks it in messages, a rollout function asks it in tokens. All three take one path:
what the function adds between two completions is the environment's reply. So seeds, deadlines, recorded pieces and routes are those of
all trajectories, and an engine's failure never passes through a user's `except`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from verst import extend
from verst.errors import ExtensionError
from verst.rollout.agent import AgentEnvironment
from verst.rollout.tokens import Asked, Rolling, TokenSession
from verst.types import Completion, Reply

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

    def bound(self, rolling: Rolling) -> Callable[[], RolloutEnvironment]:
        """What makes environments, for a run that rolls so."""
        return _Bound(self, rolling)

    def __call__(self) -> RolloutEnvironment:
        raise ExtensionError("a rollout function needs to know how the run rolls: `bound` comes first")


class _Bound:
    """Serves `AgentEnvironment` as `Agents` does."""

    def __init__(self, rollouts: Rollouts, rolling: Rolling) -> None:
        self.function, self.options, self.title = rollouts.function, rollouts.options, rollouts.title
        self._rolling = rolling

    def __call__(self) -> RolloutEnvironment:
        return RolloutEnvironment(self)

    async def open(self) -> TokenSession:
        return TokenSession(self._rolling)

    def forget(self, session: TokenSession) -> None:
        session.end()


class RolloutEnvironment(AgentEnvironment):
    """One trajectory of a rollout function, as an environment whose messages are tokens."""

    def __init__(self, bound: _Bound) -> None:
        super().__init__(cast(Any, bound))

    async def reply(self, completion: Completion) -> Reply:
        assert self._session is not None, "start() comes first"
        assert self._agent is not None
        session = cast(TokenSession, self._session)
        session.answer(completion)
        asked = cast("Asked | None", await self._next())
        if asked is not None:
            return asked
        returned = self._agent.result()
        if not isinstance(returned, Mapping | None):
            raise TypeError(f"the rollout returned {returned!r:.80} of type {type(returned).__name__}, not a mapping or None")
        return session.ended(dict(returned or {}))
