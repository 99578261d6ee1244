"""A language model as a judge, behind any endpoint that speaks OpenAI's chat completions.

A judge costs money and time, so requests are limited, repeated where that helps, and never made twice for one text. An answer without a
score fails its one trajectory: 0 would be an opinion that nobody had.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from verst.errors import ExtensionError, RewardFailure
from verst.rewards.conversation import split
from verst.rewards.endpoint import Cache, Endpoint, Limits
from verst.rewards.metrics import record
from verst.types import Trajectory

_NUMBER = r"-?\d+(?:\.\d+)?"
_SCORE = rf"(?<![\w./])(?<!/ ){_NUMBER}"
"""A number, but not the scale that many judges write behind theirs: 8/10 is 8."""
_FIELD = re.compile(r"\{(\w+)\}")
_SHOWN = 120
_COUNTED = ("requests", "cached", "retries", "prompt_tokens", "completion_tokens")


class Scale:
    """How an answer is read; the options are those of `Judge`."""

    def __init__(self, pattern: str | None, choices: Mapping[str, float] | None, low: float | None, high: float | None) -> None:
        if low is not None and high is not None and low >= high:
            raise ExtensionError(f"judge: low is {low} and high {high}: low must be below")
        if choices is not None and (not choices or low is not None or high is not None):
            raise ExtensionError("judge: choices need at least one word, and have their numbers: low and high go without them")
        self._choices = None if choices is None else {str(word).casefold(): float(worth) for word, worth in choices.items()}
        words = "|".join(re.escape(word) for word in sorted(self._choices or (), key=len, reverse=True))
        try:
            self._pattern = re.compile(pattern or (rf"\b(?:{words})\b" if words else _SCORE), re.IGNORECASE | re.DOTALL)
        except re.error as error:
            raise ExtensionError(f"judge: pattern {pattern!r} is not a regular expression: {error}") from error
        self._low, self._high = low, high

    def score(self, text: str) -> float:
        """Raises `RewardFailure` for an answer that has none."""
        matches = list(self._pattern.finditer(text))
        if not matches:
            raise RewardFailure(f"the judge's answer has no score ({self._pattern.pattern}): {_excerpt(text)}")
        found = (matches[-1][1 if self._pattern.groups else 0] or "").strip()
        if self._choices is not None:
            if found.casefold() not in self._choices:
                raise RewardFailure(f"the judge chose {found!r}, which is none of {', '.join(self._choices)}: {_excerpt(text)}")
            return self._choices[found.casefold()]
        if not re.fullmatch(_NUMBER, found):
            raise RewardFailure(f"the judge's score {found!r} is not a number: {_excerpt(text)}")
        return self._scaled(float(found), text)

    def _scaled(self, number: float, text: str) -> float:
        if (self._low is not None and number < self._low) or (self._high is not None and number > self._high):
            raise RewardFailure(f"the judge's score {number:g} is outside of {self._low} to {self._high}: {_excerpt(text)}")
        return number if self._low is None or self._high is None else (number - self._low) / (self._high - self._low)


class Judge:
    """The score that a model gives the completion.

    base_url: of the endpoint, with its /v1. model: its name there.
    prompt: what the judge is told; `{prompt}` is the last message before the first answer, `{completion}` the last answer, `{conversation}`
      all messages, any other name a field of the prompt. Other braces stand for themselves.
    pattern: finds the score in the judge's answer, in its first group or whole; of several the last counts. Default: a number (8 of 8/10).
    choices: words and what they are worth, `{"yes": 1, "no": 0}`, in place of numbers. Default pattern: one of the words.
    low, high: the scale. A number outside is no score, and with both the reward is 0 at low and 1 at high.
    system: a system message. max_tokens: of the answer. extra: more members of the request's body.
    api_key_env: the environment variable with the key. It reaches this reward's process only, never a log or a run's directory.
    max_concurrent, per_minute: requests at a time and in a minute, of one worker process. retries: after a failure that may pass (network,
      429, 5xx), with growing pauses, or after the pause that `Retry-After` asks for. timeout_s: of one request.
    cache: a file (SQLite) that keeps answers by everything that was asked, for other workers and runs; default: memory of this process.

    Records `judge/requests`, `judge/cached`, `judge/retries`, `judge/prompt_tokens` and `judge/completion_tokens` of every trajectory: what
    a request costs counts for the one that asked first, and the others that wait for its answer have 1 of `cached` and 0 of the rest.
    """

    SECRETS = ("api_key_env",)
    """Options that name environment variables which the worker needs, though their names speak of secrets."""

    def __init__(  # noqa: PLR0913 - they are the options of a run file, all by name
        self,
        *,
        base_url: str,
        model: str,
        prompt: str,
        pattern: str | None = None,
        choices: Mapping[str, float] | None = None,
        low: float | None = None,
        high: float | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        extra: Mapping[str, Any] | None = None,
        api_key_env: str | None = None,
        max_concurrent: int = 16,
        per_minute: int | None = None,
        retries: int = 4,
        timeout_s: float = 20.0,
        cache: str | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ExtensionError(f"judge: base_url {base_url!r} is no address: write it as http://HOST:PORT/v1")
        if max_concurrent < 1 or retries < 0 or timeout_s <= 0 or (per_minute is not None and per_minute < 1):
            raise ExtensionError("judge: max_concurrent, per_minute and timeout_s must be above 0, and retries not below")
        self._url, self._prompt, self._system = base_url.rstrip("/") + "/chat/completions", prompt, system
        self._scale = Scale(pattern, choices, low, high)
        self._body = {"model": model, "temperature": 0, "max_tokens": max_tokens, **(extra or {})}
        self._limits = Limits(max_concurrent, per_minute, retries, timeout_s)
        self._key_name, self._cache_path = api_key_env, cache
        self._asked: dict[str, asyncio.Task[float]] = {}

    def open(self) -> None:
        """In the process that scores: reads the key, opens the cache. Raises `ExtensionError` if that fails."""
        key = None
        if self._key_name is not None:
            key = os.environ.get(self._key_name)
            if not key:
                raise ExtensionError(f"judge: the environment variable {self._key_name} (api_key_env) is not set where rewards run: set it")
        self._cache = Cache(self._cache_path)
        self._endpoint = Endpoint(self._url, key, self._limits)

    async def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        for name in _COUNTED:
            record(f"judge/{name}", 0)  # means are over those that have it: who costs nothing counts too
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        return await self._ask({**self._body, "messages": [*messages, {"role": "user", "content": self._filled(trajectory, fields)}]})

    def _filled(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> str:
        opening, _ = split(trajectory)
        values = {
            **fields,
            "prompt": opening[-1].content if opening else "",
            "completion": trajectory.completion,
            "conversation": "\n\n".join(f"{m.role}: {m.content}" for m in trajectory.messages),
        }
        missing = [name for name in _FIELD.findall(self._prompt) if name not in values]
        if missing:
            raise RewardFailure(
                f"the judge's prompt has {{{missing[0]}}}, of which the task knows nothing; its fields: {', '.join(fields)}"
            )
        return _FIELD.sub(lambda match: str(values[match[1]]), self._prompt)  # in one pass: a completion cannot name a field

    async def _ask(self, body: Mapping[str, Any]) -> float:
        """The score, of one request for all that ask the same at the same time."""
        key = hashlib.sha256(json.dumps([self._url, body], sort_keys=True).encode()).hexdigest()
        text = self._cache.get(key)
        if text is not None:
            record("judge/cached", 1)
            return self._scale.score(text)
        asking = self._asked.get(key)
        if asking is not None:
            record("judge/cached", 1)
        else:
            # the task has this trajectory's context, so its costs are recorded there, for as long as that one waits
            asking = self._asked[key] = asyncio.create_task(self._ask_anew(key, body))
            asking.add_done_callback(lambda done: (self._asked.pop(key), done.cancelled() or done.exception()))
        return await asyncio.shield(asking)  # its answer is paid for, and others may wait for it

    async def _ask_anew(self, key: str, body: Mapping[str, Any]) -> float:
        text = await self._endpoint.complete(body)
        score = self._scale.score(text)
        self._cache.put(key, text)  # one without a score is not kept
        return score


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else "…" + text[-_SHOWN:])
