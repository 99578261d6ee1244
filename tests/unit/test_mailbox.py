"""Many calls as few messages, without one holding up another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from verst.errors import DeadlineExceeded, EngineFailure
from verst.runtime.mailbox import Answer, Call, Inbox, Mailbox


class Wire:
    """Connects a mailbox to an inbox in the same process and counts messages."""

    def __init__(self, target: Any, inbox: Inbox | None = None) -> None:
        self.inbox = inbox or Inbox(target)
        self.submitted: list[int] = []
        self.collected: list[int] = []
        self.broken: Exception | None = None
        self.mailbox = Mailbox("actor", self.submit, self.collect)

    async def submit(self, caller: int, calls: Sequence[Call]) -> None:
        self.submitted.append(len(calls))
        self.inbox.submit(caller, calls)

    async def collect(self, caller: int, wait_s: float) -> list[Answer]:
        if self.broken is not None:
            raise self.broken
        answers = await self.inbox.collect(caller, wait_s)
        self.collected.append(len(answers))
        return answers


async def test_calls_of_one_turn_share_a_message_and_answers_find_their_callers():
    async def double(method: str, value: int) -> int:
        return 2 * value

    wire = Wire(double)
    assert await asyncio.gather(*(wire.mailbox.call("double", i) for i in range(50))) == [2 * i for i in range(50)]
    assert wire.submitted == [50]
    assert sum(wire.collected) == 50
    assert len(wire.collected) <= 3


async def test_a_slow_call_holds_up_no_other():
    release = asyncio.Event()

    async def target(method: str) -> str:
        if method == "slow":
            await release.wait()
        return method

    wire = Wire(target)
    slow = asyncio.create_task(wire.mailbox.call("slow"))
    for _ in range(3):
        assert await asyncio.wait_for(wire.mailbox.call("fast"), 1) == "fast"
    assert not slow.done()
    release.set()
    assert await asyncio.wait_for(slow, 1) == "slow"


async def test_a_caller_that_died_takes_no_answer_of_another():
    """Its `collect` is still outstanding at the actor, and so is a call of it."""
    release, begun = asyncio.Event(), asyncio.Event()

    async def target(method: str) -> str:
        if method == "slow":
            begun.set()
            await release.wait()
        return method

    dead = Wire(target)
    given_up = asyncio.create_task(dead.mailbox.call("slow"))
    await begun.wait()
    successor = Wire(target, dead.inbox)
    assert await asyncio.wait_for(successor.mailbox.call("fast"), 1) == "fast"
    assert dead.collected == []
    release.set()
    assert await asyncio.wait_for(given_up, 1) == "slow"
    assert not dead.inbox._running


async def test_an_error_reaches_its_caller_only():
    async def target(method: str) -> str:
        if method == "broken":
            raise EngineFailure("out of memory")
        return method

    wire = Wire(target)
    results = await asyncio.gather(wire.mailbox.call("fine"), wire.mailbox.call("broken"), return_exceptions=True)
    assert results[0] == "fine"
    assert isinstance(results[1], EngineFailure)
    assert str(results[1]) == "out of memory"


async def test_a_defect_travels_with_its_traceback():
    class Local(Exception):  # a type that another process could not unpickle
        pass

    async def target(method: str) -> str:
        raise Local("what happened")

    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*test_mailbox(.|\n)*what happened"):
        await Wire(target).mailbox.call("anything")


async def test_a_broken_connection_fails_every_pending_call():
    async def never(method: str) -> None:
        await asyncio.sleep(60)

    wire = Wire(never)
    wire.broken = EngineFailure("replica 0 died")
    results = await asyncio.wait_for(asyncio.gather(*(wire.mailbox.call("x") for _ in range(3)), return_exceptions=True), 1)
    assert [str(r) for r in results] == ["replica 0 died"] * 3


async def test_a_caller_that_gave_up_is_not_missed():
    async def echo(method: str, delay_s: float) -> float:
        await asyncio.sleep(delay_s)
        return delay_s

    wire = Wire(echo)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wire.mailbox.call("echo", 0.05), 0.01)
    assert await asyncio.wait_for(wire.mailbox.call("echo", 0.1), 1) == 0.1


async def test_a_call_whose_caller_gave_up_is_taken_back_from_the_actor():
    ended: list[str] = []
    begun = asyncio.Event()

    async def target(method: str) -> str:
        if method == "endless":
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(method)
                raise
        return method

    wire = Wire(target)
    endless = asyncio.create_task(wire.mailbox.call("endless"))
    await begun.wait()
    endless.cancel()
    await asyncio.wait({endless})
    assert await asyncio.wait_for(wire.mailbox.call("next"), 1) == "next"
    assert ended == ["endless"]
    assert not wire.inbox._running
    unsent = asyncio.create_task(wire.mailbox.call("next"))
    await asyncio.sleep(0)
    unsent.cancel()  # before its message has left
    assert await asyncio.wait_for(wire.mailbox.call("next"), 1) == "next"


async def test_an_actor_that_answers_nothing_at_all_is_given_up(monkeypatch: pytest.MonkeyPatch):
    async def never(caller: int, wait_s: float) -> list[Answer]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr(Mailbox, "COLLECT_S", 0.01)
    monkeypatch.setattr(Mailbox, "SILENCE_S", 0.04)
    wire = Wire(never)
    mailbox = Mailbox("replica 3", wire.submit, never)
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for replica 3 to answer at all"):
        await asyncio.wait_for(mailbox.call("never"), 5)
