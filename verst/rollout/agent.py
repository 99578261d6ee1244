"""Agents that ask for completions themselves: `rollout.environment: agent:module:function`.

An environment answers the policy; an agent asks it. Its trajectories are token in, token out like all others: of each call only what stands
behind the policy's last answer is rendered, and what the policy said stays the tokens that it sampled. Tools of its calls are told to the
policy by the chat template, and what it calls is told to the agent apart from its text. `verst.rollout.conversations` answers its calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from verst import extend
from verst.errors import EnvironmentFailure
from verst.rollout.endpoint import Endpoint
from verst.rollout.sessions import Session
from verst.rollout.user_loop import Caller, UserLoop, settle
from verst.types import Prompt

SIGNATURE = ("session", "prompt")


class Agents:
    """An agent, `fn(session, prompt, **options)`, plain or async, that is called once for each trajectory.

    What it returns, a mapping or None, is the trajectory's `info`. A plain function runs in a thread of its own, which nobody can end:
    once its trajectory is over, each of its calls is refused. `close` ends the endpoint that they all share. An object with `__call__` may
    have `check_machine()`, called once in each replica, and a plain `close()`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        extend.check_callable(function, "agent", SIGNATURE, options)
        self.function, self.options = function, options
        self.title = f"agent {getattr(function, '__qualname__', type(function).__qualname__)}"
        """By which messages name it."""
        self._endpoint: Endpoint | None = None
        self._starting = asyncio.Lock()

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

    def begin(self, session: Session, prompt: Prompt, users: UserLoop, caller: Caller) -> asyncio.Future[Any]:
        """Calls it, in the users' loop. Whoever cancels a plain function is rid of it, though its thread goes on."""
        call = partial(self.function, session, prompt, **self.options)
        return asyncio.ensure_future(users.run(call, caller)) if extend.is_async(self.function) else _on_a_thread(call)

    def forget(self, session: Session) -> None:
        session.end()
        if self._endpoint is not None:
            self._endpoint.remove(session)

    async def close(self) -> None:
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            await endpoint.close()
        getattr(self.function, "close", lambda: None)()


def _on_a_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """What `call()` gives, on a thread of its own, so that none waits for one that does not return. Who cancels it is rid of it at once."""
    home = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = home.create_future()

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:  # noqa: BLE001 - SystemExit too: told where somebody waits
            error = raised
        with contextlib.suppress(RuntimeError):  # the worker's loop is closed: nobody waits
            home.call_soon_threadsafe(settle, ended, result, error)

    try:
        threading.Thread(target=copy_context().run, args=(run,), name="plain agent", daemon=True).start()
    except RuntimeError as error:  # the machine has no more
        settle(ended, None, EnvironmentFailure(f"was not called: {error}"))
    return ended
