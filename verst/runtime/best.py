"""The checkpoint of the step whose evaluation came out best (`checkpoint.best`): it stays, and RUN/best.json names it.

A step counts once both are there, its value and its checkpoint, whichever comes first.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from verst.config.schema import Config
from verst.runtime.rundir import RunDirectory, replace_file
from verst.runtime.stored import Best, best_of, checkpoint_steps
from verst.training.checkpoints import prune, step_path


class BestKeeper:
    """Of one run. Its methods touch the disk; they may be called from several threads."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self._metric, self._keep, self._run = config.checkpoint.best, config.checkpoint.keep, run
        self._measured: tuple[int, float] | None = None  # the newest step, and its value
        self._settling = threading.Lock()
        known = best_of(run) if self._metric is not None else None
        self._best = known if known is not None and step_path(run.checkpoints, known.step).is_dir() else None

    @property
    def steps(self) -> tuple[int, ...]:
        """Those whose checkpoints stay besides the newest."""
        return () if self._best is None else (self._best.step,)

    def measured(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """What was measured with the weights of a step. Returns a line if that makes its checkpoint the best.

        A metric that is missing, or no finite number, never wins; of equal values the first stays. Raises `OSError` as `settle` does.
        """
        value = None if self._metric is None else metrics.get(self._metric)
        if value is None or not math.isfinite(value):
            return None
        self._measured = step, value
        return self.settle(step)

    def settle(self, step: int) -> str | None:
        """Makes the checkpoint of a step the best if it is there and its value is the largest, or was measured anew. Returns a line then.

        Raises `OSError` if the record cannot be written; the former one stays.
        """
        with self._settling:
            if self._metric is None or self._measured is None or self._measured[0] != step:
                return None
            value, former = self._measured[1], self._best
            better = former is None or value > former.value or (step == former.step and value != former.value)
            if not better or not step_path(self._run.checkpoints, step).is_dir():
                return None
            best = Best(self._metric, step, value)
            replace_file(self._run.best, (json.dumps(asdict(best)) + "\n").encode())  # before the former one may be removed
            self._best = best
            prune(self._run.checkpoints, max(checkpoint_steps(self._run)), self._keep, self.steps)
            return f"best checkpoint: step {step}, {self._metric} {value:.3f}" + (f" (was step {former.step})" if former else "")
