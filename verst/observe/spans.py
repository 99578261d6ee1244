"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spans:
    """The phases of a step, on `time.perf_counter`, since construction. Phases may repeat and then add up; they must not nest."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended = self.began
        self.phases: list[tuple[str, float, float]] = []
        """`(phase, begin, end)`, in the order of their ends."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self.began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append((phase, began, time.perf_counter()))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase."""
        found: dict[str, float] = {}
        for phase, began, ended in self.phases:
            found[phase] = found.get(phase, 0.0) + ended - began
        return found

    def report(self) -> dict[str, float]:
        """Ends the step. `time/PHASE_s` for each phase, `time/step_s` for all, and `time/other_s` for what no phase covers."""
        self.ended = time.perf_counter()
        total, seconds = self.ended - self.began, self.seconds
        phases = {f"time/{phase}_s": s for phase, s in seconds.items()}
        return phases | {"time/step_s": total, "time/other_s": total - sum(seconds.values())}
