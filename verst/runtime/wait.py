"""Every wait has a deadline that names who was awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from verst.errors import DeadlineExceeded

T = TypeVar("T")


async def within(awaitable: Awaitable[T], deadline_s: float, who: str) -> T:
    """Awaits for at most `deadline_s` seconds.

    Raises:
        DeadlineExceeded: names `who` (for example "trainer rank 1: optimizer_step") and the limit.
    """
    limit = asyncio.timeout(deadline_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise  # a time-out of the awaited code itself, not of this wait
        raise DeadlineExceeded(f"waited {deadline_s:g} s for {who}") from None
