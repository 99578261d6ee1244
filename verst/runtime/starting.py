"""What is lost while a run starts: replaced as it is later, with the same limits.

    trainer rank   all ranks build everything anew, the lost one in a new process; what they had been asked for is done again
    replica        another one starts in its place, before the run goes on

Once the loop has begun, it and the replacer see to it (`verst.runtime.revival`, `verst.runtime.replacer`).
"""

from __future__ import annotations

import time
from asyncio import sleep
from collections.abc import Awaitable, Callable
from typing import TypeVar

from verst.errors import EngineFailure, first_line
from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.faults import Faults
from verst.runtime.pools import Replicas
from verst.runtime.replacer import PAUSES_S
from verst.runtime.replica import Replica
from verst.runtime.revival import Losses
from verst.runtime.trainers import Trainers, TrainersLost

T = TypeVar("T")


class Starting:
    """Of one loop. `step`: the last one that is committed."""

    def __init__(
        self,
        trainers: Trainers,
        replicas: Replicas,
        spawn_replica: Callable[[int, int], Worker],
        losses: Losses,
        faults: Faults,
        step: int,
    ) -> None:
        self._trainers, self._replicas, self._spawn_replica = trainers, replicas, spawn_replica
        self._losses, self._faults, self._step = losses, faults, step

    async def trainers(self, *, again: bool) -> None:
        """Starts all ranks. `again`: some may live that an earlier loop has started. Raises `GivenUp` if they are lost again and again."""
        try:
            await (self._trainers.rebuild() if again else self._trainers.start())
        except TrainersLost as lost:
            await self._rebuilt(lost)

    async def surviving(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does what needs the trainers; once more, with those who were brought back, if ranks are lost in it. Raises `GivenUp`."""
        while True:
            try:
                return await work()
            except TrainersLost as lost:
                await self._rebuilt(lost)

    async def _rebuilt(self, lost: TrainersLost) -> None:
        """Without a training state: there was none yet, or it is restored behind this."""
        began = time.monotonic()
        while True:
            await self._losses.count(lost, self._step, "the start of the run")
            try:
                replaced = await self._trainers.rebuild()
            except TrainersLost as again:
                lost = again
            else:
                break
        seconds = time.monotonic() - began
        role = ", ".join(replaced) or "trainers"
        self._faults.recovered(role, self._step, "the start", seconds, f"trainers: {role} started again after {seconds:.1f} s")

    async def replica(self, first: Replica, work: Callable[[Replica], Awaitable[T]]) -> T:
        """What `work`, which starts it too, gives of a replica, or of another in its place if its process dies in it.

        Raises `EngineFailure` if that of the last attempt dies too, and what else `work` raises.
        """
        began, replica, pauses_s = time.monotonic(), first, list(PAUSES_S)
        while True:
            try:
                found = await work(replica)
            except WorkerDied as error:
                self._faults.lost(replica.name, self._step, error)
                if not pauses_s:
                    raise EngineFailure(
                        f"{first.name} and all that took its place died while the run started: {first_line(error)}"
                    ) from error
                await sleep(pauses_s.pop(0))
                replica = self._replicas.begin_with(self._spawn_replica, replica)
            else:
                break
        if replica is not first:
            seconds = time.monotonic() - began
            line = f"{replica.name} takes the place of {first.name}, {seconds:.1f} s later"
            self._faults.recovered(first.name, self._step, "replacement", seconds, line)
        return found
