"""Agents that are plain functions: each has a thread of its own, and what ends such a thread ends its trajectory alone."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.test_agent import LIMITS, PROMPT, rolled, saying
from tests.unit.test_roll import roller
from verst.errors import EnvironmentFailure
from verst.rollout.agent import Agents
from verst.rollout.sessions import Session
from verst.types import Prompt, Status


def exits(session: Session, prompt: Prompt) -> None:
    raise SystemExit(3)


def finds_nothing(session: Session, prompt: Prompt) -> None:
    next(letter for letter in "abc" if letter == "d")


def interrupts(session: Session, prompt: Prompt) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("agent", "reason"),
    [(exits, "raised SystemExit: 3"), (finds_nothing, "raised StopIteration"), (interrupts, "raised KeyboardInterrupt")],
)
def test_what_would_end_a_thread_or_its_loop_fails_the_trajectory_with_its_line(agent: Any, reason: str):
    """In a loop of its own: the worker's would have ended with it."""
    trajectory = asyncio.run(asyncio.wait_for(rolled(agent), 10))
    assert trajectory.status is Status.FAILED
    assert str(trajectory.error).startswith(f"agent {agent.__qualname__}: {reason}")
    assert __file__ in str(trajectory.error)


async def test_no_agent_waits_for_the_thread_of_another_nor_does_anything_else():
    """All begin before any ends, though the loop has one thread for all else; and that one stays free."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    together, over = threading.Barrier(8, timeout=20), threading.Event()

    def solve(session: Session, prompt: Prompt) -> None:
        together.wait()
        over.wait(20)

    agents = Agents(solve)
    rolling = asyncio.create_task(roller(saying(), agents, group_size=8, **LIMITS).roll(0, PROMPT))
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 10) == "free"
    finally:
        over.set()
        group = await rolling
        await agents.close()
    assert not together.broken
    assert {str(t.error).partition(" ended")[2] for t in group.trajectories} == {" without asking for a completion"}


async def test_a_thread_that_cannot_be_started_fails_the_trajectory(monkeypatch: pytest.MonkeyPatch):
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    agents = Agents(exits)
    with pytest.raises(EnvironmentFailure, match="can't start new thread"):
        await agents.begin(Session("http://127.0.0.1:1", "key"), PROMPT, None, None)  # type: ignore[arg-type]
