"""Turns what happened into metric rows and lines for a person."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from verst.algorithms.table import algorithm_for
from verst.config.plan import read_config
from verst.config.schema import Config
from verst.errors import VerstError
from verst.extend import escaped
from verst.model_spec import install
from verst.observe.limits import FidelityWatch
from verst.observe.outliers import Outliers
from verst.observe.sinks import JsonlSink, read_rows
from verst.observe.spans import Spans
from verst.observe.terminal import step_line
from verst.observe.timeline import Timeline
from verst.observe.tracking import Tracking
from verst.routing.kinds import routed_experts
from verst.runtime import batching
from verst.runtime.outlets import Outlets
from verst.runtime.rundir import RunDirectory
from verst.runtime.transfer import Brought
from verst.types import Group

_KEPT_LINES = 10_000
"""For a watcher that comes late: some hours of a busy run."""


def fidelity_watch(config: Config) -> FidelityWatch:
    """The watch over a run's mismatch, which tells of routes that are not replayed. Raises `ModelError` if the model is needed and gone."""
    unreplayed = config.train.routes != "replay" and algorithm_for(config.algorithm).learns_from == "policy"
    if unreplayed:
        install(config.model.spec)
    routes = routed_experts(read_config(config.model.path)) if unreplayed else None
    return FidelityWatch(config.fidelity.limit, config.fidelity.action, None if routes is None else config.train.routes)


class Observer:
    """One run's eyes. Lines are numbered, so that a watcher that comes late or twice repeats nothing, and knows what it missed."""

    def __init__(self, run: RunDirectory, steps: int, fidelity: FidelityWatch) -> None:
        self._run = run
        self._steps = steps
        self._fidelity = fidelity
        self._sink = JsonlSink(run.metrics)
        self.timeline = Timeline(run.timeline)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._told = 0  # lines so far
        self._more = asyncio.Event()
        self._pulled: dict[str, float] = {}
        self._outliers = Outliers()
        self._failed_checkpoints = 0
        self._checkpoint = 0  # the step of the newest one; 0: none
        self._outlets = Outlets(Tracking())
        self._newest: Mapping[str, Any] = {"step": -1}  # row

    def open_outlets(self, config: Config) -> None:
        """From here on rows also go to trackers and to Prometheus, as configured; those until here went there before a restart."""
        self._newest = max(read_rows(self._run.metrics), key=lambda row: row["step"], default=self._newest)
        self._outlets = Outlets.open(self._run, config, reported=self._newest["step"], tell=self.note)

    async def close_outlets(self) -> None:
        """Lets the trackers take what waits for them, and tells of what they did not take."""
        await asyncio.to_thread(self._outlets.close)
        self._tell_of_outlets()

    def _tell_of_outlets(self) -> None:
        for line in self._outlets.told():
            self.note(line)

    def record(self, line: str) -> str:
        """One line for those who look later (`verst watch`), also when nobody watches now. As it was written."""
        line = escaped(line)
        with contextlib.suppress(OSError), self._run.log.open("a", encoding="utf-8") as log:  # a full disk ends the run elsewhere
            log.write(line + "\n")
        return line

    def note(self, line: str) -> None:
        """One line for the person who watches."""
        self._lines.append(self.record(line))
        self._told += 1
        self._more.set()

    async def lines(self, after: int, wait_s: float) -> tuple[int, list[str]]:
        """The number of the last line, and the lines beyond the first `after`; waits up to `wait_s` for one to come."""
        if self._told <= after:
            self._more.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._more.wait()
            except TimeoutError:
                return after, []
        begin = after - (self._told - len(self._lines))
        lost = [f"({-begin} lines are no longer kept)"] if begin < 0 else []
        return self._told, [*lost, *islice(self._lines, max(0, begin), None)]

    def published(self, version: int, brought: Brought) -> None:
        """A version serves. Its pull may end after the row of its step is written, so rows name the version."""
        self._pulled = {"mismatch/probe": brought.difference, "mismatch/probe_version": float(version)}
        self._pulled |= {f"engine/{name}": value for name, value in brought.stats.items()}
        self.timeline.pulled(version, brought.during, brought.sending)

    def checkpoint_written(self, step: int) -> None:
        """A checkpoint is complete on disk."""
        self._checkpoint = step

    def checkpoint_failed(self, step: int, error: VerstError) -> None:
        """A checkpoint could not be written: told at once, and counted in every row from here on."""
        self._failed_checkpoints += 1
        self.note(f"warning: checkpoint of step {step} was not written ({error}); the former one stays, training goes on")

    def row(self, step: int) -> Mapping[str, Any] | None:
        """The newest row, if it is of a step or of the evaluation of its weights; None: the step has none."""
        return self._newest if self._newest["step"] == step else None

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The evaluation before the first step, or one that was still owed as the run was resumed."""
        self._sink.write({"kind": "evaluation", "step": step, **metrics})
        self._newest = {"step": step, **metrics}
        self._outlets.evaluation(step, metrics)
        names = [f"{name.removesuffix('failed')}reward" for name in metrics if name.endswith("/failed")]
        rewards = [f"{name} {'unknown (every scoring failed)' if name not in metrics else f'{metrics[name]:.3f}'}" for name in names]
        self.note(f"{f'step {step}' if step else 'before training'}: {', '.join(rewards)}")

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """What is known of a step before an update is made of it. Raises `TrainingDiverged` if a limit says that none must be."""
        for line in self._fidelity.check(step, metrics):
            self.note(line)

    def step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], spans: Spans) -> None:
        """One committed step."""
        times = spans.report()
        row: dict[str, float] = dict(metrics) | times | self._pulled | self._outlets.counts()
        row |= {"checkpoint/step": float(self._checkpoint), "checkpoint/failed": float(self._failed_checkpoints)}
        row |= self.timeline.step(step, groups, spans)
        found, lines = self._outliers.look(step, row)
        row |= found
        reasons = batching.failures(groups)
        self._sink.write({"kind": "step", "step": step, **row, **({"failures": dict(reasons)} if reasons else {})})
        self._newest = {"step": step, **row}
        self._outlets.step(step, row, groups, reasons.total())
        self.note(step_line(step, self._steps, row))
        for line in (*(f"  {count} failed: {reason}" for reason, count in reasons.most_common(3)), *lines):
            self.note(line)
        if self.timeline.trouble:
            self.note(self.timeline.trouble)
            self.timeline.trouble = None
        self._tell_of_outlets()

    def finish(self) -> None:
        """The picture and the three-line summary."""
        from verst.observe.report import draw, summary

        rows = read_rows(self._run.metrics)
        draw(rows, self._run.report, self._run.root.name)
        for line in summary(rows):
            self.note(line)
        self.note(f"{self._run.report}")

    def close(self) -> None:
        self.timeline.close()
        self._sink.close()
