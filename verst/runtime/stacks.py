"""The stacks of a run's processes in one file, for whoever has to find out what they stood still in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from verst.observe.stacks import stacks, write_stacks
from verst.runtime.actors import Worker
from verst.runtime.wait import explained_by


async def stack_report(workers: Sequence[Worker]) -> str:
    """What every process does now, this one included. One that does not answer within 5 s is described from outside."""
    said = await asyncio.gather(*(worker.stacks() for worker in workers))
    names = ["this process", *(worker.name for worker in workers)]
    return "\n\n".join(f"==== {name}\n{text}" for name, text in zip(names, [stacks(), *said], strict=True))


class KeepStacks:
    """Writes the stacks of a run's processes into its logs. `workers` says which there are."""

    def __init__(self, workers: Callable[[], Sequence[Worker]], directory: Path) -> None:
        self._workers, self._directory = workers, directory

    async def __call__(self, reason: str) -> list[str]:
        """Returns the line that says where; or why nothing was written, whatever fails: nothing that it explains may fail of it."""
        return await explained_by(self._kept(reason), _unkept)

    async def _kept(self, reason: str) -> list[str]:
        report = await stack_report(self._workers())
        return [f"what each process did then: {await asyncio.to_thread(write_stacks, self._directory, report, reason)}"]


def _unkept(error: Exception) -> list[str]:
    return [f"what each process did could not be written: {type(error).__name__}: {error}"]
