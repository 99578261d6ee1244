"""The bound on what is in flight."""

from __future__ import annotations

import asyncio

import pytest

from verst.errors import InvariantViolation
from verst.runtime.slots import GroupSlots


async def test_room_waits_until_a_slot_is_freed():
    slots = GroupSlots(2)
    slots.take(0)
    slots.take(1)
    waiting = asyncio.create_task(slots.room())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await slots.free([0])
    await asyncio.wait_for(waiting, 1)
    assert slots.held == 1


async def test_taking_beyond_capacity_or_twice_is_refused():
    slots = GroupSlots(1)
    slots.take(7)
    with pytest.raises(InvariantViolation, match="group 8 was admitted beyond the capacity of 1"):
        slots.take(8)
    with pytest.raises(InvariantViolation, match="group 7 was admitted twice"):
        slots.take(7)


async def test_freeing_what_is_not_held_is_refused():
    slots = GroupSlots(1)
    with pytest.raises(InvariantViolation, match="group 3 was freed without holding a slot"):
        await slots.free([3])
