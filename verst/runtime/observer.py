"""Turns what happened into metric rows and lines for a person."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from verst.observe.sinks import JsonlSink, read_rows
from verst.observe.spans import Spans
from verst.observe.terminal import step_line
from verst.runtime import batching
from verst.runtime.rundir import RunDirectory
from verst.types import Group


class Observer:
    """One run's eyes. Lines are numbered, so that a watcher that comes late or twice misses and repeats nothing."""

    def __init__(self, run: RunDirectory, steps: int) -> None:
        self._run = run
        self._steps = steps
        self._sink = JsonlSink(run.metrics)
        self._lines: list[str] = []
        self._more = asyncio.Event()
        self._probe = 0.0

    def note(self, line: str) -> None:
        """One line for the person who watches."""
        self._lines.append(line)
        self._more.set()

    async def lines(self, after: int, wait_s: float) -> list[str]:
        """Lines beyond the first `after`; waits up to `wait_s` for one to come."""
        if len(self._lines) <= after:
            self._more.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._more.wait()
            except TimeoutError:
                return []
        return self._lines[after:]

    def published(self, version: int, probe: float) -> None:
        """A version serves; `probe` is the largest |trainer - engine| of the probe's log-probabilities."""
        del version
        self._probe = probe

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The evaluation before the first step."""
        self._sink.write({"kind": "evaluation", "step": step, **metrics})
        reward = metrics.get("eval/reward")
        self.note(f"before training: eval/reward {'unknown (every scoring failed)' if reward is None else f'{reward:.3f}'}")

    def step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], spans: Spans) -> None:
        """One committed step."""
        times = spans.report()
        generated = sum(t.generated_tokens for g in groups for t in g.trajectories)
        row: dict[str, Any] = dict(metrics) | times | {"tokens_per_s": generated / times["time/step_s"], "mismatch/probe": self._probe}
        reasons = batching.failures(groups)
        self._sink.write({"kind": "step", "step": step, **row, **({"failures": dict(reasons)} if reasons else {})})
        self.note(step_line(step, self._steps, row))
        for reason, count in reasons.most_common(3):
            self.note(f"  {count} failed: {reason}")

    def finish(self) -> None:
        """The picture and the three-line summary."""
        from verst.observe.report import draw, summary

        rows = read_rows(self._run.metrics)
        draw(rows, self._run.report, self._run.root.name)
        for line in summary(rows):
            self.note(line)
        self.note(f"{self._run.report}")

    def close(self) -> None:
        self._sink.close()
