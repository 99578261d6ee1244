"""One rollout replica as the loop's process knows it: its number, its worker, and how far it is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from verst.runtime.actors import Worker


class Stage(StrEnum):
    """How far a replica is. One that the run began with serves from the run's first publish on."""

    STARTING = "starting"  # its process and its engine start; nobody waits for it
    READY = "ready"  # it waits for the next publish, and takes part in it
    SERVING = "serving"  # it holds a verified version, and is given groups
    REFUSED = "refused"  # it could not take the version it was to begin with
    LEAVING = "leaving"  # it finishes the groups that it has, and takes part in no publish


@dataclass(eq=False)
class Replica:
    """A replica. Its number is its own for as long as the run's processes live: no later one gets it."""

    number: int
    worker: Worker
    stage: Stage = Stage.SERVING
    in_flight: int = 0
    """Groups, evaluated prompts included."""
    evaluating: int = 0
    """Evaluated prompts, each of one trajectory."""
    finished: int = 0
    """Groups that came back from it."""
    weight_ranks: int = 1
    """Members of a weight group that its engine becomes."""
    first_version: int = 0
    """The one that it began to serve with."""
    error: Exception | None = None
    """Why it was refused."""
    rolled_again: list[int] = field(default_factory=list)
    """Admission numbers of groups that it did not finish after it was told to leave: others rolled them."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it serves or was refused."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it leaves and has nothing in flight."""

    @property
    def name(self) -> str:
        return self.worker.name

    def ended_one(self) -> None:
        """A group that it had is not in flight any more."""
        self.in_flight -= 1
        if self.stage is Stage.LEAVING and not self.in_flight:
            self.idle.set()

    def leave(self) -> None:
        """It is given nothing from here on."""
        self.stage = Stage.LEAVING
        if not self.in_flight:
            self.idle.set()
