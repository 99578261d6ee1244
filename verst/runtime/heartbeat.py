"""Processes that live and do not answer: stopped, or stuck where even their event loop cannot run.

A worker answers while it works, so one that is silent for long can do nothing for the run. It is ended; whoever waits for it then finds it
dead, which is what recovery begins with. Without this, a silent trainer rank would hold up a step for the whole limit of its call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.wait import NoAnswer, within

EVERY_S = 5.0
SILENCE_S = 60.0
"""Much longer than the imports of large libraries hold up a process."""


class Heartbeat:
    """`workers` are those of the run now."""

    def __init__(self, workers: Callable[[], Sequence[Worker]], note: Callable[[str], None]) -> None:
        self._workers, self._note = workers, note
        self._asked: set[Worker] = set()

    async def run(self) -> None:
        """Asks every worker again and again, for ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for worker in self._workers():
                    if worker not in self._asked:
                        self._asked.add(worker)
                        tasks.create_task(self._ask(worker))
                await asyncio.sleep(EVERY_S)

    async def _ask(self, worker: Worker) -> None:
        try:
            await worker.where()  # one that has never answered is still to be started, which has a limit of its own
            await within(worker.ping(), SILENCE_S, f"{worker.name} to answer at all", idle=True)
        except NoAnswer:
            self._note(f"{worker.name} has not answered for {SILENCE_S:g} s and is ended: {(await worker.stacks()).splitlines()[0]}")
            worker.kill()
        except WorkerDied:
            return  # whoever waits for it finds that out; it is not asked again
        self._asked.discard(worker)
