"""The calls to one server: what it works on is known, can be taken back, and whoever waits learns at once when the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from verst.errors import DeadlineExceeded, EngineFailure
from verst.rollout.sglang.api import ServerApi, ServerLost
from verst.rollout.sglang.connection import Connection
from verst.rollout.sglang.runs import Run

T = TypeVar("T")

GENERATE_DEADLINE_S = 24 * 3600.0
PAUSE_DEADLINE_S = 60.0
_ASK_AGAIN_S = 0.1
_LAST_WORDS_S = 10.0


class Calls:
    """Args: `connection`, to the server; it may open later."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.failure: EngineFailure | None = None
        self.nonce = secrets.token_hex(8)
        """No other engine's on the same server."""
        self.sent: dict[str, Run] = {}  # by the server's id
        self.counters = dict.fromkeys(("generated_tokens", "prompt_tokens", "prefill_tokens"), 0)
        self._broken = asyncio.Event()
        self._returned = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._asked = 0

    @property
    def api(self) -> ServerApi:
        return self._connection.api

    def live(self) -> None:
        """Raises `EngineFailure` with the reason if the server does not serve."""
        if self.failure is not None:
            raise EngineFailure(str(self.failure)) from self.failure
        if not self._connection.is_open:
            raise EngineFailure("the sglang engine is used before start()")

    def ended(self, failure: EngineFailure) -> None:
        """The server serves no more: whoever waits for it gets the reason."""
        if self.failure is None:
            self.failure = failure
        self._broken.set()

    def new_id(self) -> str:
        """For a request; all have one length, because an abort ends every request whose id begins with the one given."""
        self._asked += 1
        return f"{self.nonce}-{self._asked:012d}"

    async def ask(self, run: Run, body: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
        """The server's answer to a question of this run, which `body` makes from the id it is asked under.

        If the call is cancelled, the server is told to end it.
        """
        server_id = run.server_id = self.new_id()
        self.sent[server_id] = run
        try:
            answer = await self.or_failure(self.api.generate(body(server_id), GENERATE_DEADLINE_S))
        except asyncio.CancelledError:
            self._abort_in_background(server_id)
            raise
        finally:
            del self.sent[server_id]
            run.server_id = None
            self._returned.set()
        meta = answer["meta_info"]
        prompt_tokens, cached_tokens = meta.get("prompt_tokens") or 0, meta.get("cached_tokens") or 0
        self.counters["prompt_tokens"] += prompt_tokens
        self.counters["prefill_tokens"] += prompt_tokens - cached_tokens
        return answer

    async def take_back(self, runs: Sequence[Run] | None = None) -> None:
        """Has the server end what it works on, of these runs or of all, until it is here. Raises `DeadlineExceeded` if it does not."""
        chosen = None if runs is None else {id(run) for run in runs}

        def out() -> list[str]:
            return [server_id for server_id, run in self.sent.items() if chosen is None or id(run) in chosen]

        try:
            async with asyncio.timeout(PAUSE_DEADLINE_S):
                while out():
                    self.live()
                    self._returned.clear()
                    await self.abort(out())
                    with contextlib.suppress(TimeoutError):  # one that was still on its way to the server when it was told
                        async with asyncio.timeout(_ASK_AGAIN_S):
                            while out():
                                self._returned.clear()
                                await self._returned.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"waited for SGLang at {self.api.url} to give back {len(out())} requests: not done within {PAUSE_DEADLINE_S:g} s"
            ) from error

    async def abort(self, server_ids: Sequence[str]) -> None:
        await asyncio.gather(*(self.or_failure(self.api.abort(server_id)) for server_id in server_ids))

    def _abort_in_background(self, server_id: str) -> None:
        async def quietly() -> None:
            with contextlib.suppress(EngineFailure, DeadlineExceeded):  # a server that has ended runs nothing that could be aborted
                await self.abort([server_id])

        task = asyncio.ensure_future(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def or_failure(self, call: Awaitable[T]) -> T:
        """The call's result, or the engine's failure as soon as it is known. A lost connection is explained by the server's end."""
        task = asyncio.ensure_future(call)
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({task, broken}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except ServerLost as lost:
            await asyncio.wait({broken}, timeout=_LAST_WORDS_S if self._connection.owns_server else 0)
            if self.failure is None:
                raise
            raise EngineFailure(str(self.failure)) from lost
        finally:
            task.cancel()
            broken.cancel()
        self.live()
        raise AssertionError("broken without a failure")

    def close(self) -> None:
        for task in self._background:
            task.cancel()
