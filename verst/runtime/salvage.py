"""Tokens of groups in flight, kept apart from the replicas that generate them, so that a lost replica takes few of them along.

Every few seconds each replica is asked for what has come since. A group that is finished by then was never sent twice. What is kept of a
group goes with it to the replica that rolls it next (`verst.rollout.recorded`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from verst.rollout.recorded import Piece
from verst.runtime.replica import Replica, Stage
from verst.runtime.wait import explained_by, within

EVERY_S = 5.0
_ANSWER_S = 60.0
"""One that is silent for that long is ended (`verst.runtime.heartbeat`)."""


class Salvage:
    """Of one run. `replicas` are those of now."""

    def __init__(self, replicas: Callable[[], Sequence[Replica]]) -> None:
        self._replicas = replicas
        self._on: dict[int, Replica] = {}
        self._pieces: dict[int, dict[str, Piece]] = {}

    def begin(self, seq: int, replica: Replica) -> list[Piece]:
        """A group is rolled on a replica from now on. Returns what is known of it."""
        self._on[seq] = replica
        return list(self._pieces.get(seq, {}).values())

    def end(self, seq: int) -> None:
        """A group has come back, or is given up."""
        self._on.pop(seq, None)
        self._pieces.pop(seq, None)

    def add(self, news: Mapping[int, Iterable[Piece]]) -> None:
        for seq, pieces in news.items():
            self._pieces.setdefault(seq, {}).update((piece.generation.id, piece) for piece in pieces)

    def tokens(self, replica: Replica) -> int:
        """Generated tokens that are kept of the groups on one replica."""
        kept = (self._pieces.get(seq, {}) for seq, on in self._on.items() if on is replica)
        return sum(len(piece.generation.tokens_T) for pieces in kept for piece in pieces.values())

    async def run(self) -> None:
        """Asks every replica that has groups, again and again, for ever."""
        async with asyncio.TaskGroup() as tasks:
            asking: dict[Replica, asyncio.Task[None]] = {}
            while True:
                await asyncio.sleep(EVERY_S)
                asking = {replica: task for replica, task in asking.items() if not task.done()}
                for replica in self._replicas():
                    if replica not in asking and replica.in_flight > replica.evaluating and replica.stage in (Stage.SERVING, Stage.LEAVING):
                        asking[replica] = tasks.create_task(self._ask(replica))

    async def _ask(self, replica: Replica) -> None:
        """One that does not answer is found elsewhere."""
        asking = within(replica.worker.post("news"), _ANSWER_S, f"{replica.name} to say what it has generated", idle=True)
        news = await explained_by(asking, lambda error: None)
        self.add({seq: pieces for seq, pieces in (news or {}).items() if self._on.get(seq) is replica})
