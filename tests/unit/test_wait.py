"""Deadlines that name who was awaited."""

from __future__ import annotations

import asyncio
import time

import pytest

from verst.errors import DeadlineExceeded, EngineFailure
from verst.runtime.wait import gather_named, kept_waits, within


async def test_result_passes_through():
    async def answer() -> int:
        return 42

    assert await within(answer(), 1.0, "nobody") == 42


async def test_expiry_names_who_and_how_long():
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.01 s for trainer rank 1: optimizer_step"):
        await within(asyncio.sleep(5), 0.01, "trainer rank 1: optimizer_step")


async def test_a_timeout_of_the_awaited_code_is_not_taken_for_this_deadline():
    async def inner() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await within(inner(), 1.0, "somebody")


async def test_a_wait_stands_in_the_table_while_it_lasts_unless_it_is_idle():
    async def waits_for(who: str, **options: bool) -> None:
        await within(asyncio.sleep(0.05), 5.0, who, **options)

    async def run() -> tuple[list[str], list[str]]:
        table = kept_waits()
        waiting = asyncio.gather(waits_for("replica 0: pull"), waits_for("replica 0 to answer at all", idle=True))
        await asyncio.sleep(0.01)
        during = [wait.awaited for wait in table.now()]
        await waiting
        return during, [wait.awaited for wait in table.now()]

    assert await asyncio.create_task(run()) == (["replica 0: pull"], [])


async def test_answers_come_in_the_order_of_the_calls():
    async def answer(value: int, after_s: float) -> int:
        await asyncio.sleep(after_s)
        return value

    assert await gather_named({"a": answer(1, 0.02), "b": answer(2, 0)}) == [1, 2]


async def after(delay_s: float, error: Exception | None = None) -> None:
    await asyncio.sleep(delay_s)
    if error is not None:
        raise error


async def test_peers_of_a_failure_get_a_grace_and_are_named():
    """As in a collective: one rank dies, one ends with the error that follows from it, one hangs."""
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("rank 2")

    calls = {
        "trainer rank 0: publish": after(0.05, RuntimeError("connection reset by peer")),
        "trainer rank 1: publish": after(0, EngineFailure("trainer rank 1 died (publish)")),
        "trainer rank 2: publish": hang(),
        "trainer rank 3: publish": after(0.05),
    }
    start = time.monotonic()
    with pytest.raises(EngineFailure) as caught:
        await gather_named(calls, grace_s=0.2)
    assert 0.2 <= time.monotonic() - start < 5
    assert str(caught.value) == "trainer rank 1 died (publish) (trainer rank 2: publish: no answer within 0.2 s after that)"
    assert ended == ["rank 2"], "a call is left running behind an error"


async def test_a_diagnosis_is_preferred_to_what_came_before_it():
    """A peer may notice a broken connection before the supervisor tells who died."""
    calls = {"a": after(0, RuntimeError("connection reset by peer")), "b": after(0.05, EngineFailure("rank 1 died")), "c": after(0.1)}
    start = time.monotonic()
    with pytest.raises(EngineFailure, match=r"^rank 1 died$"):
        await gather_named(calls, grace_s=5)
    assert time.monotonic() - start < 4, "it must not wait for anybody once all have ended"


async def test_a_defect_keeps_its_type_and_gets_a_note():
    with pytest.raises(ZeroDivisionError) as caught:
        await gather_named({"a": after(0, ZeroDivisionError("x")), "b": after(60)}, grace_s=0.05)
    assert caught.value.__notes__ == ["b: no answer within 0.05 s after that"]


async def test_calls_end_with_the_one_who_waits_for_them():
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    waiting = asyncio.create_task(gather_named({"a": hang()}))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
