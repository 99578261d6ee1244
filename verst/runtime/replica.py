"""One rollout replica as the loop's process knows it: its number, its worker, and how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from verst.errors import VerstError
from verst.runtime.actors import Worker
from verst.runtime.wait import within

T = TypeVar("T")

ANSWER_S = 5.0
"""Within which a process answers that has nothing else to do."""


class Stage(StrEnum):
    """How far a replica is. One that the run began with serves from the run's first publish on."""

    STARTING = "starting"  # its process and its engine start; nobody waits for it
    READY = "ready"  # it waits for the next publish, and takes part in it
    SERVING = "serving"  # it holds a verified version, and is given groups
    REFUSED = "refused"  # it could not take the version it was to begin with
    LOST = "lost"  # its process died, its engine broke, or it does not answer
    LEAVING = "leaving"  # it finishes the groups that it has, and takes part in no publish


def fresh(workers: Sequence[Worker]) -> list[Replica]:
    """Those that a run begins with."""
    return [Replica(number, worker, slot=number) for number, worker in enumerate(workers)]


@dataclass(eq=False)
class Replica:
    """A replica. Its number is its own for as long as the run's processes live: no later one gets it."""

    number: int
    worker: Worker
    stage: Stage = Stage.SERVING
    slot: int = 0
    """Its place: the server's URL, the GPU and the log that a replacement has after it."""
    in_flight: int = 0
    """Groups, evaluated prompts included."""
    evaluating: int = 0
    """Evaluated prompts among them."""
    samples: int = 0
    """Trajectories of those."""
    finished: int = 0
    """Groups that came back from it."""
    started: bool = False
    """Its engine runs."""
    weight_ranks: int = 1
    """Members of a weight group that its engine becomes."""
    first_version: int = 0
    """The one that it began to serve with."""
    version: int = 0
    """The newest that it has taken."""
    error: Exception | None = None
    """Why it was refused, or cannot finish what it has."""
    rolled_again: list[int] = field(default_factory=list)
    """Admission numbers of groups that it did not finish after it was told to leave, or was lost: others rolled them."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it serves or was refused."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it leaves, and has nothing in flight or cannot finish what it has."""
    had: int = 0
    """Groups in flight when it was lost."""
    salvaged: int = 0
    """Generated tokens that are kept of them."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is lost: nobody waits for it any more."""
    _peak: int = 0  # in flight at a time, as far as one of them has ended

    @property
    def name(self) -> str:
        return self.worker.name

    @property
    def most_in_flight(self) -> int:
        """Groups that it had at a time since it last had none: of those that it has, each was given a limit for at most so many."""
        return max(self._peak, self.in_flight)

    def began_one(self, samples: int = 0) -> None:
        """It has one more group; `samples`: trajectories of one that is evaluated."""
        self.in_flight += 1
        self.evaluating += samples > 0
        self.samples += samples

    def ended_one(self, samples: int = 0) -> None:
        """A group that it had is not in flight any more."""
        self.evaluating -= samples > 0
        self.samples -= samples
        self._peak = self.most_in_flight if self.in_flight > 1 else 0
        self.in_flight -= 1
        if self.stage is Stage.LEAVING and not self.in_flight:
            self.done.set()

    def leave(self) -> None:
        """It is given nothing from here on."""
        self.stage = Stage.LEAVING
        if not self.in_flight:
            self.done.set()

    async def answers(self) -> VerstError | None:
        """Why it cannot go on: its process does not answer, or its engine is broken. None if it can."""
        try:
            await within(self.worker.call("check"), ANSWER_S, f"{self.name} to answer")
        except VerstError as error:
            return error
        return None

    async def ask(self) -> None:
        """One that is new is refused if it does not answer: the others would wait for it, with their engines paused."""
        error = await self.answers()
        if error is not None:
            self.refuse(error)

    def lose(self, error: VerstError) -> None:
        """It is given nothing from here on, and its process is ended, which may be stuck."""
        self.stage, self.error, self.had = Stage.LOST, error, self.in_flight
        self.gone.set()
        self.changed.set()
        self.worker.kill()

    def refuse(self, error: VerstError) -> None:
        """It could not take a version. Not one that serves."""
        if self.stage is Stage.LEAVING:
            self.give_up(error)
        elif self.stage is Stage.READY:
            self.stage, self.error = Stage.REFUSED, error
            self.changed.set()

    def give_up(self, error: VerstError) -> None:
        """It leaves, and cannot finish the groups that it has."""
        self.error = error
        self.done.set()


class Replacing(Protocol):
    """Sees to replicas whose processes die while the run starts (`verst.runtime.starting`)."""

    async def replica(self, first: Replica, work: Callable[[Replica], Awaitable[T]]) -> T:
        """What `work`, which starts it too, gives of a replica, or of another in its place."""
        ...
