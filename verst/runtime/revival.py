"""Trainers that lost a rank, brought back: rebuilt, and restored from the memory of their machines, else from the disk.

    1  ranks that are dead or stuck are ended and replaced; the others keep their processes and build everything anew
    2  all take the newest snapshot that is complete on all; without one the newest checkpoint; without one the initial model
    3  the loop trains the journaled steps since then again, which must reach the weights that were committed

Losses without a committed step between them are retried after a pause that grows, and end the run after a few: then something is wrong that
no restart mends.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from verst.errors import VerstError
from verst.runtime.limits import REPLACEMENTS
from verst.runtime.stored import newest_state
from verst.runtime.trainers import TrainersLost
from verst.runtime.wait import NoAnswer

if TYPE_CHECKING:
    from verst.runtime.parts import Parts

_SOURCES = {
    "snapshot": "memory",
    "checkpoint": "the disk, because there is no snapshot in memory",
    "model": "the model that the run began with, because there is no snapshot and no checkpoint",
}

PAUSES_S = (0.0, 2.0, 10.0)
"""Before the first, second, … attempt without a committed step between them."""


class GivenUp(VerstError):
    """What was lost was lost again each time that it was brought back."""


class Revival:
    """Of the trainers of one loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._version = -1  # committed when they were last lost
        self._losses = 0  # since then

    async def bring_back(self, lost: TrainersLost, version: int) -> int:
        """Returns the step whose state they have now, at most `version`, the last one that is committed.

        Raises `GivenUp` if they are lost again and again without a committed step between.
        """
        began = time.monotonic()
        while True:
            await self._count(lost, version)
            try:
                step, source, replaced = await self._restored(version)
            except TrainersLost as again:
                lost = again
            else:
                break
        seconds = time.monotonic() - began
        line = f"trainers: {_said(replaced)}restored to step {step} from {_SOURCES[source]} after {seconds:.1f} s"
        if step < version:
            line += f"; steps {step + 1} to {version} are trained again from the journal"
        self._parts.faults.recovered(", ".join(replaced) or "trainers", step, source, seconds, line)
        return step

    async def _count(self, lost: TrainersLost, version: int) -> None:
        """Tells of a loss, and waits before the next attempt."""
        self._losses = self._losses + 1 if version == self._version else 1
        self._version = version
        if self._losses > REPLACEMENTS:
            raise GivenUp(
                f"{lost}; the trainers were lost {self._losses} times in step {version + 1}, which was begun again each time. What was "
                f"committed is safe: mend the cause, then go on with: verst resume {self._parts.run.root}"
            ) from lost
        self._parts.faults.lost("the trainers", version, lost)
        if isinstance(lost.__cause__, NoAnswer):  # before what does not answer is ended
            for line in await self._parts.keep_stacks("a trainer rank did not answer"):
                self._parts.faults.failed(line)
        await asyncio.sleep(PAUSES_S[min(self._losses, len(PAUSES_S)) - 1])

    async def _restored(self, version: int) -> tuple[int, str, list[str]]:
        """The step, what it was restored from, and the ranks that were replaced."""
        replaced = await self._parts.trainers.rebuild()
        await self._parts.transfer.reopen()
        step = await self._parts.snapshots.restore(version)
        if step is not None:
            return step, "snapshot", replaced
        checkpoint, warnings = await asyncio.to_thread(newest_state, self._parts.run)
        for warning in warnings:
            self._parts.observer.note(f"warning: {warning}")
        if checkpoint is None:
            return 0, "model", replaced
        await self._parts.trainers.restore(str(checkpoint.path.parent), checkpoint.step)
        return checkpoint.step, "checkpoint", replaced


def _said(replaced: list[str]) -> str:
    return f"{', '.join(replaced)} replaced, " if replaced else ""
