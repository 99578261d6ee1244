"""User code that blocks its event loop: what becomes of its trajectory, of the others, and of the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import openai
import pytest

from tests.unit.test_agent import ASK, LIMITS, client
from tests.unit.test_roll import END, MORE, PROMPT, ids, roller
from verst.errors import EnvironmentFailure
from verst.rollout import user_loop
from verst.rollout.agent import Agents
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.rollouts import Rollouts
from verst.rollout.sessions import Session
from verst.rollout.tokens import TokenSession
from verst.rollout.user_loop import Caller, UserLoop
from verst.testing import FakeEngine
from verst.types import Completion, FinishReason, Message, Prompt, Reply, Status

RELEASED = threading.Event()
"""Ends what a test has waiting in C, which nothing else could."""
ADVICE = "await what takes long, or give it to asyncio.to_thread"
SAID = Completion("4", (1,), FinishReason.STOP)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(user_loop, "GRACE_S", 0.3)
    monkeypatch.setattr(user_loop, "_YIELD_S", 0.5)
    RELEASED.clear()
    yield
    RELEASED.set()


def waits_in_c() -> None:
    RELEASED.wait(60)


def computes() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass


BLOCKS = pytest.mark.parametrize("block", [waits_in_c, computes])


class Talk:
    """An environment of two turns that lasts a moment in each."""

    def __init__(self) -> None:
        self.turns = 0

    async def start(self, prompt: Prompt) -> tuple[Message, ...]:
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        self.turns += 1
        return MORE if self.turns == 1 else Reply()


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


async def longest_pause(work: asyncio.Future[Any]) -> float:
    """Of this loop, in seconds."""
    pause, last = 0.0, time.monotonic()
    while not work.done():
        await asyncio.sleep(0.01)
        pause, last = max(pause, time.monotonic() - last), time.monotonic()
    return pause


@BLOCKS
async def test_a_reply_that_blocks_fails_its_trajectory_and_the_others_go_on(block: Any, caplog: pytest.LogCaptureFixture):
    numbers = iter(range(10))

    class Third(Talk):
        async def reply(self, completion: Completion) -> Reply:
            if not self.turns and next(numbers) == 2:
                block()
            return await super().reply(completion)

    made = roller(FakeEngine([[*ids("4"), END]] * 4), Third, group_size=4, max_turns=2, environment_deadline_s=1.0)
    rolling = asyncio.ensure_future(made.roll(0, PROMPT))
    began = time.monotonic()
    assert await longest_pause(rolling) < 0.9
    ended = (await rolling).trajectories
    assert time.monotonic() - began < 5
    assert [t.status for t in ended].count(Status.FINISHED) == 3
    (failed,) = (t for t in ended if t.status is Status.FAILED)
    assert str(failed.error).startswith(f"environment {Third.__qualname__}: reply in turn 1: blocks its event loop in {block.__name__} (")
    assert str(failed.error).endswith(ADVICE)
    assert ("given up (1 so far)" in caplog.text) == (block is waits_in_c)
    assert ("was interrupted" in caplog.text) == (block is computes)
    later = (await made.roll(1, PROMPT)).trajectories
    assert [t.status for t in later] == [Status.FINISHED] * 4


@BLOCKS
async def test_a_start_and_a_close_that_block_fail_in_time(block: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.rollout.boundary.CLOSE_DEADLINE_S", 0.3)

    class Start(Talk):
        async def start(self, prompt: Prompt) -> tuple[Message, ...]:
            block()
            return prompt.messages

    class Close(Talk):
        async def close(self) -> None:
            block()

    users = UserLoop()
    with pytest.raises(EnvironmentFailure, match=rf"Start: start: blocks its event loop in {block.__name__}"):
        await GuardedEnvironment(Start, 0.3, users).start(PROMPT)
    guarded = GuardedEnvironment(Close, 5.0, users)
    assert await guarded.start(PROMPT) == PROMPT.messages
    assert f"Close: close: blocks its event loop in {block.__name__}" in str(await guarded.close())
    users.close()


async def test_what_was_in_the_midst_of_a_loop_that_is_given_up_names_who_blocked_it(caplog: pytest.LogCaptureFixture):
    users, began = UserLoop(), asyncio.Event()
    here = asyncio.get_running_loop()

    async def suspended() -> None:
        here.call_soon_threadsafe(began.set)
        await asyncio.sleep(60)

    async def blocks() -> None:
        waits_in_c()

    async def number() -> int:
        return 5

    middle = asyncio.ensure_future(users.run(suspended, Caller("agent A")))
    await began.wait()
    guilty = Caller("environment B")
    blocking = asyncio.ensure_future(users.run(blocks, guilty))
    waiting = asyncio.ensure_future(users.run(number, Caller("agent C")))
    assert await users.within(blocking, 0.2, guilty)
    with pytest.raises(EnvironmentFailure, match=r"^has lost its event loop, which environment B blocked in waits_in_c \("):
        await middle
    assert await waiting == 5  # it had not begun
    assert await users.run(number, Caller("agent D")) == 5
    users.close()


async def test_one_that_computes_within_its_deadline_is_waited_for():
    """Also by those who wait for their turn longer than their own deadline is."""

    class Slow(Talk):
        async def reply(self, completion: Completion) -> Reply:
            RELEASED.wait(0.3)
            return Reply()

    engine = FakeEngine([[*ids("4"), END]] * 8)
    ended = (await roller(engine, Slow, group_size=8, environment_deadline_s=0.8).roll(0, PROMPT)).trajectories
    assert [t.status for t in ended] == [Status.FINISHED] * 8


async def test_a_task_that_an_environment_left_behind_is_found(caplog: pytest.LogCaptureFixture):
    class Leaves(Talk):
        async def start(self, prompt: Prompt) -> tuple[Message, ...]:
            self.left = asyncio.create_task(self.blocks())
            return prompt.messages

        async def blocks(self) -> None:
            await asyncio.sleep(0.05)
            computes()

    users = UserLoop(hold_s=0.5)
    leaves, other = GuardedEnvironment(Leaves, 0.3, users), GuardedEnvironment(Talk, 0.3, users)
    await leaves.start(PROMPT)
    await asyncio.sleep(0.2)
    assert await other.start(PROMPT) == PROMPT.messages
    assert f"environment {Leaves.__qualname__} blocked the event loop of user code in computes (" in caplog.text
    users.close()


@BLOCKS
async def test_one_that_holds_the_loop_too_long_has_blocked_it_whatever_its_deadline(block: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(user_loop, "_WATCH_S", 0.1)

    class Blocks(Talk):
        async def reply(self, completion: Completion) -> Reply:
            block()
            return Reply()

    users = UserLoop(hold_s=0.5)
    guarded = GuardedEnvironment(Blocks, 60.0, users)
    await guarded.start(PROMPT)
    began = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="blocks its event loop in"):
        await guarded.reply(SAID)
    assert 0.5 < time.monotonic() - began < 5
    users.close()


async def test_a_trajectory_that_its_limit_finds_behind_another_says_who_blocks():
    class Waits(Talk):
        async def reply(self, completion: Completion) -> Reply:
            waits_in_c()
            return Reply()

    made = roller(FakeEngine([[*ids("4"), END]]), Waits, environment_deadline_s=60)
    (trajectory,) = (await made.roll(0, PROMPT, deadline_s=2.0)).trajectories
    name = f"environment {Waits.__qualname__}"
    assert str(trajectory.error).startswith(
        f"not finished after 2 s, waiting for {name} to reply, while {name} blocks the event loop of user"
    )


async def test_an_environment_that_ends_its_process_ends_its_trajectory():
    class Exits(Talk):
        async def reply(self, completion: Completion) -> Reply:
            raise SystemExit(3)

    users = UserLoop()
    guarded = GuardedEnvironment(Exits, 5.0, users)
    await guarded.start(PROMPT)
    with pytest.raises(EnvironmentFailure, match=r"reply in turn 1: raised SystemExit: 3 \("):
        await guarded.reply(SAID)
    assert await GuardedEnvironment(Talk, 5.0, users).start(PROMPT) == PROMPT.messages
    users.close()


async def test_an_async_agent_may_ask_its_own_session_with_a_client_that_blocks():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            reply = api.chat.completions.create(model="m", messages=[ASK])
        return {"said": reply.choices[0].message.content}

    agents = Agents(solve)
    engine = FakeEngine([[*ids("four"), END]] * 3, tick_s=0.05)
    ended = (await roller(engine, agents, group_size=3, **LIMITS).roll(0, PROMPT)).trajectories
    await agents.close()
    assert [(t.status, t.info) for t in ended] == [(Status.FINISHED, {"said": "four"})] * 3


@BLOCKS
async def test_an_agent_that_blocks_fails_and_the_next_works(block: Any):
    hangs = iter([True, False])

    async def solve(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            await api.chat.completions.create(model="m", messages=[ASK])
        if next(hangs):
            block()

    agents = Agents(solve)
    made = roller(FakeEngine([[*ids("4"), END]] * 2), agents, environment_deadline_s=1.0, **LIMITS)
    (first,) = (await made.roll(0, PROMPT)).trajectories
    assert str(first.error).startswith(f"{agents.title}: blocks its event loop in {block.__name__} (")
    assert str(first.error).endswith(ADVICE)
    assert first.completion == "4"
    (second,) = (await made.roll(1, PROMPT)).trajectories
    assert second.status is Status.FINISHED
    await agents.close()


@BLOCKS
async def test_a_rollout_function_that_blocks_fails_and_the_next_works(block: Any):
    hangs = iter([True, False])

    async def think(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages))
        if next(hangs):
            block()

    made = roller(FakeEngine([[*ids("4"), END]] * 2), Rollouts(think), environment_deadline_s=0.5)
    (first,) = (await made.roll(0, PROMPT)).trajectories
    assert f"reply in turn 1: blocks its event loop in {block.__name__} (" in str(first.error)
    (second,) = (await made.roll(1, PROMPT)).trajectories
    assert second.status is Status.FINISHED


async def test_calls_made_in_one_moment_begin_in_their_order():
    users, order = UserLoop(), list[int]()

    async def noted(number: int) -> int:
        order.append(number)
        return number

    calls = (users.run(lambda number=number: noted(number), Caller(str(number))) for number in range(50))
    assert await asyncio.gather(*calls) == list(range(50))
    assert order == list(range(50))
    users.close()


async def test_who_cancels_a_call_waits_for_its_end():
    users, events, here = UserLoop(), list[str](), asyncio.get_running_loop()
    began = asyncio.Event()

    async def tidy() -> None:
        try:
            here.call_soon_threadsafe(began.set)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            events.append("tidied")

    call = asyncio.ensure_future(users.run(tidy, Caller("tidy")))
    await began.wait()
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    assert call.cancelled()
    assert events == ["tidied"]
    users.close()


async def test_its_thread_ends_with_it():
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "user code"}

    async def nothing() -> None: ...

    before = threads()
    closed, dropped = UserLoop(), UserLoop()
    await closed.run(nothing, Caller("a"))
    await dropped.run(nothing, Caller("b"))
    own = threads() - before  # those of other tests may end at any time
    assert len(own) == 2
    closed.close()
    del dropped
    await asyncio.to_thread(wait_until, lambda: not any(thread.is_alive() for thread in own))
