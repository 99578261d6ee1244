"""Group slots: the one bound on everything in flight, and so on staleness.

A slot is taken when a prompt is admitted and freed only when the engines have pulled and verified the weights that include the
group's gradient (or when the group is dropped). Batches take groups in the order of admission, so a group consumed at version v
shares the slots with every group admitted before it: with C slots and batches of P groups it was admitted at version v - s or later,
s <= ceil((C - 1) / P), and s = 0 for C = P, which is synchronous training. The loop measures s at every step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from verst.errors import InvariantViolation


class GroupSlots:
    """A bounded set of admitted groups, used from one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: set[int] = set()
        self._freed = asyncio.Condition()

    @property
    def held(self) -> int:
        return len(self._held)

    async def room(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Waits until a slot is free and `wanted`. Unblocked by `free`.

        It has no deadline: the feed idles here by design while the trainer works, and it is the consumer's waits that expire.
        """
        async with self._freed:
            await self._freed.wait_for(lambda: len(self._held) < self.capacity and wanted())

    def take(self, seq: int) -> None:
        """Takes a slot for group `seq`, which must be free: call `room` first."""
        if seq in self._held:
            raise InvariantViolation(f"group {seq} was admitted twice")
        if len(self._held) >= self.capacity:
            raise InvariantViolation(f"group {seq} was admitted beyond the capacity of {self.capacity} slots")
        self._held.add(seq)

    async def free(self, seqs: Iterable[int]) -> None:
        """Gives back the slots of groups whose gradient the engines now hold, or that were dropped."""
        async with self._freed:
            for seq in seqs:
                if seq not in self._held:
                    raise InvariantViolation(f"group {seq} was freed without holding a slot")
                self._held.remove(seq)
            self._freed.notify_all()
