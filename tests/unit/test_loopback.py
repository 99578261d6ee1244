"""Calls of agents to their sessions do not go through a proxy."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from typing import Any

import httpx
import openai
import pytest

from tests.unit.test_agent import ASK, client, rolled
from verst import secrets
from verst.config.load import load_config
from verst.rollout.loopback import bypass_proxies
from verst.rollout.sessions import Session
from verst.runtime import rollout_worker
from verst.runtime.extensions import Extensions
from verst.types import Prompt, Status

DEAD = "http://127.0.0.1:9"
NAMES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in NAMES[:2]:
        monkeypatch.setenv(name, DEAD)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ("127.0.0.1,localhost", "127.0.0.1,localhost")),
        ({"NO_PROXY": "a.b, .c"}, ("a.b,.c,127.0.0.1,localhost", "a.b,.c,127.0.0.1,localhost")),
        ({"NO_PROXY": "a.b", "no_proxy": "localhost"}, ("a.b,127.0.0.1,localhost", "localhost,127.0.0.1")),
        ({"NO_PROXY": "a.b", "no_proxy": ""}, ("a.b,127.0.0.1,localhost", "127.0.0.1,localhost")),
        ({"no_proxy": "*"}, ("*", "*")),
    ],
)
def test_this_machine_is_added_to_what_no_proxy_is_asked_for(before: dict[str, str], after: tuple[str, str]):
    environment = {"HTTP_PROXY": DEAD, **before}
    for _ in range(2):
        bypass_proxies(environment)
        assert (environment["NO_PROXY"], environment["no_proxy"]) == after
    assert environment["HTTP_PROXY"] == DEAD


async def test_agents_with_clients_of_their_own_reach_their_session(dead_proxy: None):
    def by_urllib(session: Session) -> int:
        request = urllib.request.Request(f"{session.base_url}/models", headers={"Authorization": f"Bearer {session.api_key}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        with pytest.raises(openai.APIConnectionError):
            async with client(session) as api:
                await api.models.list()
        bypass_proxies(os.environ)
        async with client(session) as api:
            answer = await api.chat.completions.create(model="m", messages=[ASK])
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {session.api_key}"}) as plain:
            statuses = [(await plain.get(f"{session.base_url}/models")).status_code, await asyncio.to_thread(by_urllib, session)]
        return {"answer": answer.choices[0].message.content, "statuses": statuses}

    trajectory = await rolled(solve, "4")
    assert (trajectory.status, trajectory.error) == (Status.FINISHED, None)
    assert trajectory.info == {"answer": "4", "statuses": [200, 200]}


def test_a_replica_does_so_before_it_loads_user_code(dead_proxy: None, monkeypatch: pytest.MonkeyPatch):
    seen: list[str | None] = []

    class Loaded(Exception):
        pass

    def unpack(packed: bytes | None) -> Extensions:
        seen.append(os.environ.get("NO_PROXY"))
        raise Loaded

    monkeypatch.setattr(rollout_worker, "is_actor", lambda: True)
    monkeypatch.setattr(secrets, "take", lambda but: None)
    monkeypatch.setattr(Extensions, "unpack", unpack)
    values = {"run": {"steps": 1}, "model": {"path": "unused"}, "data": {"path": "unused"}}
    config = load_config(values)
    with pytest.raises(Loaded):
        rollout_worker.replica_worker(config, None)
    assert seen == ["127.0.0.1,localhost"]
