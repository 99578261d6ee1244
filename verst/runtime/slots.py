"""Group slots, the one bound on everything in flight, and the order in which groups are trained: together they bound staleness.

A slot is taken when a prompt is admitted and freed only when the engines have pulled and verified the weights that include the group's
gradient (or when the group is dropped). The next group to train is the oldest finished one among the numbers less than a window beyond
the oldest group that is not trained yet. `docs/staleness.md` proves what follows from these two rules.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Set

from verst.errors import InvariantViolation
from verst.types import Group


class GroupSlots:
    """A bounded set of admitted groups, used from one event loop."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: set[int] = set()
        self._freed = asyncio.Condition()

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def seqs(self) -> Set[int]:
        """The groups that hold a slot."""
        return self._held

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


class Ready:
    """Admitted groups that no batch has taken, in the order of admission, and those of them that are finished.

    `window` 1 takes them strictly in that order. A larger one lets groups pass that finish early, as far as the window reaches beyond the
    oldest: never further, so that short answers get ahead of long ones by less than `window` places.
    """

    def __init__(self, window: int = 1) -> None:
        self._window = window
        self._order: deque[int] = deque()
        self._finished: dict[int, Group] = {}
        self._changed = asyncio.Condition()

    def admit(self, seq: int) -> None:
        if self._order and seq <= self._order[-1]:
            raise InvariantViolation(f"group {seq} was admitted after group {self._order[-1]}")
        self._order.append(seq)

    async def put(self, group: Group) -> None:
        async with self._changed:
            self._finished[group.seq] = group
            self._changed.notify_all()

    async def pop(self) -> Group:
        """The next group to train, once one may be taken. Unblocked by `put`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next() is not None)
            seq = self._next()
            assert seq is not None
            self._order.remove(seq)
            return self._finished.pop(seq)

    def _next(self) -> int | None:
        for seq in self._order:
            if seq >= self._order[0] + self._window:
                return None
            if seq in self._finished:
                return seq
        return None
