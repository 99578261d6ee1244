"""A call of all trainer ranks that takes much longer than usual: one line says who is behind, long before a deadline ends the run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from verst.observe.outliers import Progress
from verst.runtime.actors import Worker
from verst.runtime.wait import explained_by, within

_TIMES = 3.0
_AT_LEAST_S = 10.0
"""A call is overdue once it takes so many times its usual time, and so many seconds."""
_KNOWN = 3
"""Calls whose time is usual."""
_ASK_S = 2.0


class Overdue:
    """Knows how long each call usually takes. `tell` takes the line."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._took_s: dict[str, deque[float]] = {}

    @asynccontextmanager
    async def watching(self, method: str, workers: Sequence[Worker]) -> AsyncIterator[None]:
        """Around one call of all workers."""
        took_s, begun = self._took_s.setdefault(method, deque(maxlen=20)), time.monotonic()
        watch = asyncio.create_task(self._watch(method, workers, took_s, begun))
        try:
            yield
            took_s.append(time.monotonic() - begun)
        finally:
            watch.cancel()
            await asyncio.wait({watch})

    async def _watch(self, method: str, workers: Sequence[Worker], took_s: Sequence[float], begun: float) -> None:
        if len(took_s) < _KNOWN:
            return
        usual_s = statistics.median(took_s)
        await asyncio.sleep(max(_AT_LEAST_S, _TIMES * usual_s))
        who = await explained_by(behind(workers), lambda error: f"who is behind could not be told: {error}")
        self._tell(f"{method} has taken {time.monotonic() - begun:.0f} s (usually {usual_s:.1f} s): {who}")


async def behind(workers: Sequence[Worker]) -> str:
    """Which of the ranks the others wait for, as they say themselves; one that does not answer is described from outside."""
    said = await asyncio.gather(*map(_asked, workers))
    silent = [f"{worker.name} {answer}" for worker, answer in zip(workers, said, strict=True) if isinstance(answer, str)]
    if silent:
        return "; ".join(silent)
    progress = [answer for answer in said if not isinstance(answer, str)]
    working = [worker.name for worker, found in zip(workers, progress, strict=True) if not found.waits]
    passed = [found.passed for found in progress]
    if 0 < len(working) < len(workers):
        return f"{', '.join(working)} still computes, the others wait for it ({_counts(workers, passed)})"
    if min(passed) < max(passed):
        least = [worker.name for worker, count in zip(workers, passed, strict=True) if count == min(passed)]
        return f"{', '.join(least)} is behind ({_counts(workers, passed)})"
    return f"no rank is behind the others ({_counts(workers, passed)}); kill -USR1 to this command writes what each does"


async def _asked(worker: Worker) -> Progress | str:
    asking = within(worker.call("progress"), _ASK_S, f"{worker.name}: progress", idle=True)
    found: Progress | None = await explained_by(asking, lambda error: None)
    return found if found is not None else (await worker.stacks()).splitlines()[0]


def _counts(workers: Sequence[Worker], passed: Sequence[int]) -> str:
    if min(passed) == max(passed):
        return f"each has passed {passed[0]} layers"
    return "layers passed: " + ", ".join(f"{worker.name} {count}" for worker, count in zip(workers, passed, strict=True))
