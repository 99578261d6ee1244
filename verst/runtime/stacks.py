"""The stacks of a run's processes in one file, for whoever has to find out what they stood still in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from verst.observe.stacks import stacks, write_stacks
from verst.runtime.actors import Worker


async def stack_report(workers: Sequence[Worker]) -> str:
    """What every process does now, this one included. One that does not answer within 5 s is described from outside."""
    said = await asyncio.gather(*(worker.stacks() for worker in workers))
    names = ["this process", *(worker.name for worker in workers)]
    return "\n\n".join(f"==== {name}\n{text}" for name, text in zip(names, [stacks(), *said], strict=True))


async def keep_stacks(workers: Sequence[Worker], directory: Path, reason: str) -> list[str]:
    """Writes such a report, and returns the line that says where. Raises `OSError` if it cannot be written."""
    report = await stack_report(workers)
    return [f"what each process did then: {await asyncio.to_thread(write_stacks, directory, report, reason)}"]
