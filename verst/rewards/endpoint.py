"""Requests to an endpoint that speaks OpenAI's chat completions: limited, repeated where that helps, counted.

httpx retries connections only and knows no limits of rate; OpenAI's client is a dependency that most runs would not use.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from verst.errors import ExtensionError, RewardFailure
from verst.rewards.metrics import record

if TYPE_CHECKING:
    import httpx  # the checks of a run file need none of it

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses that may pass. 529: overloaded, of some providers."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SHOWN = 200
_IN_MEMORY = 100_000
_LOCKED_S = 10.0


class Limits(NamedTuple):
    """Of one process. `timeout_s`: of a request, whole; `retries`: after the first try."""

    max_concurrent: int
    per_minute: int | None
    retries: int
    timeout_s: float


class Endpoint:
    """Who waits for whom: a request for one of the places, then for its turn in the minute, then for the pause that a server asked for."""

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        import httpx

        self._url, self._key, self._limits = url, key, limits
        self._client = httpx.AsyncClient(
            timeout=limits.timeout_s,
            limits=httpx.Limits(max_connections=limits.max_concurrent),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
        )
        self._places = asyncio.Semaphore(limits.max_concurrent)
        self._next = 0.0  # time.monotonic() of the next request that the minute allows
        self._resume = 0.0  # and of the end of the pause

    async def complete(self, body: Mapping[str, Any]) -> str:
        """The text of the answer. Raises `RewardFailure` with what the endpoint said last."""
        failure, pause_s = "", 0.0
        for attempt in range(1 + self._limits.retries):
            if attempt:
                record("judge/retries", 1)
                await asyncio.sleep(pause_s)
            try:
                answer = await self._post(body)
            except _Failed as error:
                failure, asked_s = str(error), error.retry_after_s
                if asked_s is not None:
                    self._resume = max(self._resume, time.monotonic() + asked_s)
                pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0) if asked_s is None else 0.0
                continue
            return self._read(answer)
        raise RewardFailure(f"the judge did not answer in {1 + self._limits.retries} tries: {failure}")

    async def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        """Raises `_Failed` for what may pass, `RewardFailure` for what will not."""
        import httpx

        async with self._places:
            await self._turn()
            record("judge/requests", 1)
            try:
                async with asyncio.timeout(self._limits.timeout_s):  # httpx limits each read, and an answer may come by drops
                    response = await self._client.post(self._url, json=body)
            except (httpx.TransportError, TimeoutError) as error:
                reason = str(error) or f"no answer in {self._limits.timeout_s:g} s"
                raise _Failed(f"{type(error).__name__}: {reason}") from error
        if response.status_code in _PASSING:
            raise _Failed(self._described(response), _retry_after_s(response.headers.get("Retry-After")))
        if not response.is_success:
            raise RewardFailure(f"the judge's endpoint {self._url} refused: {self._described(response)}")
        return response

    async def _turn(self) -> None:
        if self._limits.per_minute is not None:
            now = time.monotonic()
            at, self._next = max(now, self._next), max(now, self._next) + 60 / self._limits.per_minute
            await asyncio.sleep(at - now)
        while (left_s := self._resume - time.monotonic()) > 0:  # noqa: ASYNC110 - a moment that may move, not a condition
            await asyncio.sleep(left_s)

    def _read(self, response: httpx.Response) -> str:
        try:
            answer = response.json()
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RewardFailure(f"{self._url} answered with no chat completion: {self._described(response)}") from error
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage.get(name), int):
                record(f"judge/{name}", usage[name])
        if not isinstance(text, str):
            raise RewardFailure(f"the judge answered no text: {self._described(response)}")
        return text

    def _described(self, response: httpx.Response) -> str:
        text = " ".join(response.text[:_SHOWN].split())
        if self._key is not None:
            text = text.replace(self._key, "[key]")  # some endpoints repeat it
        return f"HTTP {response.status_code}: {text}"


class Cache:
    """Answers by a key: in a file for all processes that name it, or the newest `_IN_MEMORY` of this process."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._memory: dict[str, str] = {}
        if path is not None:
            self._sql("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")

    def get(self, key: str) -> str | None:
        if self._path is None:
            return self._memory.get(key)
        rows = self._sql("SELECT text FROM answers WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, text: str) -> None:
        if self._path is not None:
            self._sql("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, text)
            return
        self._memory[key] = text
        if len(self._memory) > _IN_MEMORY:
            del self._memory[next(iter(self._memory))]

    def _sql(self, command: str, *values: str) -> list[Any]:
        assert self._path is not None
        try:
            with closing(sqlite3.connect(self._path, timeout=_LOCKED_S)) as connection, connection:
                return connection.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise ExtensionError(f"judge: cache {self._path} cannot be used: {error}: name a file in a directory that exists") from error


class _Failed(Exception):
    """One try that may go better the next time."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def _retry_after_s(header: str | None) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3). None: not given, or not understood."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max((at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
