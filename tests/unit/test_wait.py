"""Deadlines that name who was awaited."""

from __future__ import annotations

import asyncio

import pytest

from verst.errors import DeadlineExceeded
from verst.runtime.wait import within


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
