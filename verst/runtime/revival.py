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
    from pathlib import Path

    from verst.runtime.faults import Faults
    from verst.runtime.parts import Parts
    from verst.runtime.stacks import KeepStacks

_SOURCES = {
    "snapshot": "memory",
    "checkpoint": "the disk, because there is no snapshot in memory",
    "model": "the model that the run began with, because there is no snapshot and no checkpoint",
}

PAUSES_S = (0.0, 2.0, 10.0)
"""Before the first, second, … attempt without a committed step between them."""


class GivenUp(VerstError):
    """What was lost was lost again each time that it was brought back."""


class Losses:
    """Of the trainers of one loop: told, and counted as long as no step is committed between them. `root`: the run's directory."""

    def __init__(self, faults: Faults, keep_stacks: KeepStacks, root: Path) -> None:
        self._faults, self._keep_stacks, self._root = faults, keep_stacks, root
        self._version = -1  # committed when they were last lost
        self._count = 0  # since then

    async def count(self, lost: TrainersLost, version: int, what: str) -> None:
        """Tells of a loss in `what`, and waits before the next attempt. Raises `GivenUp` if it was one too many."""
        self._count = self._count + 1 if version == self._version else 1
        self._version = version
        if self._count > REPLACEMENTS:
            raise GivenUp(
                f"{lost}; the trainers were lost {self._count} times in {what}, which was begun again each time. What was "
                f"committed is safe: mend the cause, then go on with: verst resume {self._root}"
            ) from lost
        self._faults.lost("the trainers", version, lost)
        if isinstance(lost.__cause__, NoAnswer):  # before what does not answer is ended
            for line in await self._keep_stacks("a trainer rank did not answer"):
                self._faults.failed(line)
        await asyncio.sleep(PAUSES_S[min(self._count, len(PAUSES_S)) - 1])


class Revival:
    """Of the trainers of one loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._losses = Losses(parts.faults, parts.keep_stacks, parts.run.root)

    async def bring_back(self, lost: TrainersLost, version: int) -> int:
        """Returns the step whose state they have now, at most `version`, the last one that is committed.

        Raises `GivenUp` if they are lost again and again without a committed step between.
        """
        began = time.monotonic()
        while True:
            await self._losses.count(lost, version, f"step {version + 1}")
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
