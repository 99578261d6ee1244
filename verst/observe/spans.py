"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spans:
    """Wall-clock seconds by phase, since construction. Phases may repeat and then add up; they must not nest."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def report(self) -> dict[str, float]:
        """`time/PHASE_s` for each phase, `time/step_s` for all, and `time/other_s` for what no phase covers."""
        total = self.elapsed_s
        phases = {f"time/{phase}_s": s for phase, s in self.seconds.items()}
        return phases | {"time/step_s": total, "time/other_s": total - sum(self.seconds.values())}
