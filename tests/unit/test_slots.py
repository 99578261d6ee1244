"""The bound on what is in flight, the order in which groups are trained, and what the two make of staleness."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from verst.config.load import load_config
from verst.errors import InvariantViolation
from verst.runtime.slots import GroupSlots, Ready
from verst.types import Group, Message, Prompt


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


def finished(seq: int) -> Group:
    return Group(seq, Prompt(f"p{seq}", (Message("user", "q"),)), (), 0)


async def test_groups_come_in_the_order_of_admission_or_by_a_window():
    strict, windowed = Ready(), Ready(window=3)
    for ready in (strict, windowed):
        for seq in (4, 5, 6, 8):  # 7 was consumed before a restart
            ready.admit(seq)
        for seq in (6, 8):
            await ready.put(finished(seq))
    waiting = asyncio.create_task(strict.pop())
    assert (await windowed.pop()).seq == 6
    late = asyncio.create_task(windowed.pop())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert not late.done()  # 8 is beyond the window of 4, though but two groups are before it
    await strict.put(finished(4))
    await windowed.put(finished(4))
    assert (await waiting).seq == 4
    assert (await late).seq == 4


def test_admission_goes_up():
    ready = Ready()
    ready.admit(3)
    with pytest.raises(InvariantViolation, match="group 3 was admitted after group 3"):
        ready.admit(3)


def bound(capacity: int, window: int, batch: int) -> int:
    options = [f"rollout.capacity_groups={capacity}", f"train.groups_per_step={batch}", "algorithm={name: grpo, old_logprobs: behaviour}"]
    if capacity > batch:
        options.append(f"rollout.window_groups={window}")
    return load_config({"run": {"steps": 1}, "model": {"path": "m"}}, options).worst_staleness


class Asynchrony(RuleBasedStateMachine):
    """The real slots and order under every interleaving of feed, engines, trainer, pulls and drops.

    A group's oldest token is of the version that the engines served when it was admitted, or a later one; the first is assumed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def teardown(self) -> None:
        self.loop.close()

    @initialize(batch=st.integers(1, 4), beyond=st.integers(0, 9), window=st.integers(1, 6))
    def begin(self, batch: int, beyond: int, window: int) -> None:
        self.batch, capacity = batch, batch + beyond
        self.window = window if beyond else 1
        self.bound = bound(capacity, self.window, batch)
        self.slots, self.ready = GroupSlots(capacity), Ready(self.window)
        self.seq = self.committed = self.served = 0
        self.admitted_at: dict[int, int] = {}
        self.rolling: set[int] = set()
        self.taken: list[int] = []
        self.unpulled: list[list[int]] = []

    @precondition(lambda self: self.slots.held < self.slots.capacity)
    @rule(skips=st.sampled_from([0, 0, 0, 1]))
    def admit(self, skips: int) -> None:
        self.seq += skips
        self.slots.take(self.seq)
        self.ready.admit(self.seq)
        self.admitted_at[self.seq] = self.served
        self.rolling.add(self.seq)
        self.seq += 1

    @precondition(lambda self: self.rolling)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.rolling)))
        self.rolling.remove(seq)
        self.loop.run_until_complete(self.ready.put(finished(seq)))

    @rule(dropped=st.sampled_from([False, False, False, True]))
    def take(self, dropped: bool) -> None:
        """As the consumer does: one group after the other, dropping those that cannot be trained, until a batch is whole."""
        if len(self.taken) == self.batch:
            return
        popping = self.loop.create_task(self.ready.pop())
        self.loop.run_until_complete(asyncio.sleep(0))
        if not popping.done():
            popping.cancel()
            self.loop.run_until_complete(asyncio.wait({popping}))
            return
        seq = popping.result().seq
        if dropped:
            self.loop.run_until_complete(self.slots.free([seq]))
        else:
            self.taken.append(seq)

    @precondition(lambda self: len(self.taken) == self.batch)
    @rule()
    def commit(self) -> None:
        for seq in self.taken:
            assert self.committed - self.admitted_at[seq] <= self.bound
        self.unpulled.append(self.taken)
        self.taken = []
        self.committed += 1

    @precondition(lambda self: self.unpulled)
    @rule()
    def pull(self) -> None:
        self.loop.run_until_complete(self.slots.free(self.unpulled.pop(0)))
        self.served += 1

    @rule(late=st.integers(0, 2))
    def turn(self, late: int) -> None:
        """All at once, with the oldest few not finishing: long tails, which single rules seldom make."""
        while self.slots.held < self.slots.capacity:
            self.admit(0)
        for seq in sorted(self.rolling)[late:]:
            self.rolling.remove(seq)
            self.loop.run_until_complete(self.ready.put(finished(seq)))
        for _ in range(self.batch - len(self.taken)):
            self.take(dropped=False)
        if len(self.taken) == self.batch:
            self.commit()
            while self.unpulled:
                self.pull()

    @invariant()
    def slots_bound_all_that_is_in_flight(self) -> None:
        if hasattr(self, "slots"):
            assert self.slots.held <= self.slots.capacity


TestAsynchrony = pytest.mark.slow(Asynchrony.TestCase)
TestAsynchrony.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(("capacity", "window", "batch"), [(2, 1, 2), (4, 1, 2), (3, 1, 1), (6, 4, 2), (5, 3, 2), (8, 2, 3), (9, 6, 4)])
async def test_the_bound_is_reached(capacity: int, window: int, batch: int):
    """All slots are filled, the last group is finished last of all, and whatever its window lets pass comes before it."""
    slots, ready = GroupSlots(capacity), Ready(window)
    slow, committed, taken = capacity - 1, 0, list[int]()
    for seq in range(capacity):
        slots.take(seq)
        ready.admit(seq)
    seq = capacity
    waiting = list(range(slow))
    while True:
        for other in waiting:
            await ready.put(finished(other))
        waiting = []
        while len(taken) < batch:
            popping = asyncio.create_task(ready.pop())
            await asyncio.sleep(0)
            if not popping.done():  # it is the slow one's turn
                popping.cancel()
                break
            taken.append(popping.result().seq)
        if len(taken) < batch:
            break
        await slots.free(taken)
        committed, taken = committed + 1, []
        while slots.held < capacity:
            slots.take(seq)
            ready.admit(seq)
            waiting.append(seq)
            seq += 1
    assert committed == bound(capacity, window, batch)
