"""Replicas that were lost, replaced: the run goes on with the others meanwhile, and waits if there is none.

A replacement has the slot of the one that was lost, and a number of its own. It starts beside the run, takes the version that is served as
soon as the trainers have a moment for it, or the next one, and is verified before it is given groups.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from verst.errors import EngineFailure, VerstError, first_line
from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.faults import Faults
from verst.runtime.pools import Replicas
from verst.runtime.replica import Replica
from verst.runtime.stacks import KeepStacks

PAUSES_S = (0.0, 2.0, 10.0)
"""Before the first, second, … attempt at one replacement."""


class Replacer:
    """Of one run. `spawn` starts the process of a replica by its number and slot."""

    def __init__(self, replicas: Replicas, spawn: Callable[[int, int], Worker], faults: Faults, keep_stacks: KeepStacks) -> None:
        self._replicas, self._spawn, self._faults, self._keep_stacks = replicas, spawn, faults, keep_stacks

    async def run(self) -> None:
        """Replaces what is lost, for ever. Raises `EngineFailure` if a replica cannot be replaced and no other serves."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                lost = await self._replicas.next_lost()
                tasks.create_task(self._replace(lost))

    async def _replace(self, lost: Replica) -> None:
        began = time.monotonic()
        assert lost.error is not None
        self._faults.lost(lost.name, lost.version, lost.error, _with(lost))
        if not isinstance(lost.error, WorkerDied):  # it lives, and stands in something
            for line in await self._keep_stacks(f"{lost.name} was lost"):
                self._faults.failed(line)
        await self._replicas.bury(lost)
        error: Exception | None = lost.error
        for pause_s in PAUSES_S:
            await asyncio.sleep(pause_s)
            error = await self._tried(lost, began)
            if error is None:
                return
        serving = len(self._replicas.active)
        if not serving:
            raise EngineFailure(f"{lost.name} was lost ({first_line(lost.error)}) and could not be replaced: {error}") from error
        self._faults.failed(f"warning: {lost.name} is not replaced after {len(PAUSES_S)} attempts: {serving} replica(s) go on")

    async def _tried(self, lost: Replica, began: float) -> Exception | None:
        """One attempt. Returns what it failed by."""
        replica = self._replicas.begin(self._spawn, lost)
        try:
            await self._replicas.make_ready(replica)
            await replica.changed.wait()  # the trainers may be in the middle of a step, which has limits of its own
        except VerstError as error:
            replica.error = error
        if replica.error is None:
            after_s = time.monotonic() - began
            line = f"{replica.name} takes the place of {lost.name} from version {replica.first_version} on, {after_s:.1f} s later"
            self._faults.recovered(lost.name, replica.first_version, "replacement", after_s, line)
            return None
        self._faults.failed(f"{replica.name} could not take the place of {lost.name}: {first_line(replica.error)}")
        await self._replicas.bury(replica)
        return replica.error


def _with(lost: Replica) -> str:
    kept = f" from {lost.salvaged:,} tokens that are kept" if lost.salvaged else ""
    return f" with {lost.had} group(s) in flight, which are rolled again{kept}" if lost.had else ""
