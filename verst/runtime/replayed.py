"""What came out of a replay: each step with its weights hash and what is compared of its metrics, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARED = {"loss/total": "loss", "update/grad_norm": "grad norm"}
"""Metrics that are compared with the recorded ones, and what they are called in a line."""


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step that was trained again. `metrics`, `recorded`: those of `COMPARED` that it has, now and in metrics.jsonl."""

    step: int
    digest: str
    committed: str
    metrics: Mapping[str, float]
    recorded: Mapping[str, float]

    @property
    def same(self) -> bool:
        """Whether the committed weights came out."""
        return self.digest == self.committed

    def line(self) -> str:
        """The step for a person."""
        figures = [f"{name} {self.metrics[metric]:.6g}" for metric, name in COMPARED.items() if metric in self.metrics]
        weights = f"weights {self.digest} as committed" if self.same else f"weights {self.digest} DIFFER, committed {self.committed}"
        return "  ".join([f"step {self.step}", *figures, weights])

    def difference(self, metric: str) -> float | None:
        """How far a metric is from the recorded one; None where one of them is unknown."""
        if metric not in self.metrics or metric not in self.recorded:
            return None
        return abs(self.metrics[metric] - self.recorded[metric])


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came out. `steps` begin behind the state that was restored, which may be before `begin`; `causes`: of a difference, in words."""

    run: Path
    begin: int
    to: int
    begun_from: str
    steps: tuple[ReplayedStep, ...]
    causes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> ReplayedStep | None:
        """The first step whose weights are not the committed ones."""
        return next((step for step in self.steps if not step.same), None)

    @property
    def largest_differences(self) -> dict[str, tuple[float, int]]:
        """By metric: how far it is from the recorded one, and in which step. Without those that were never recorded."""
        found: dict[str, tuple[float, int]] = {}
        for metric in COMPARED:
            known = [(d, step.step) for step in self.steps if (d := step.difference(metric)) is not None]
            if known:
                found[metric] = max(known, key=lambda pair: pair[0])
        return found

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        first = self.first_difference
        return {
            "run": str(self.run),
            "from": self.begin,
            "to": self.to,
            "begun_from": self.begun_from,
            "same": first is None,
            "first_difference": None if first is None else first.step,
            "causes": list(self.causes),
            "largest_differences": {m: {"difference": d, "step": step} for m, (d, step) in self.largest_differences.items()},
            "steps": [
                {
                    "step": s.step,
                    "same": s.same,
                    "digest": s.digest,
                    "committed": s.committed,
                    "metrics": dict(s.metrics),
                    "recorded": dict(s.recorded),
                }
                for s in self.steps
            ],
        }

    def lines(self) -> list[str]:
        """The result for a person."""
        first = self.first_difference
        differing = sum(not step.same for step in self.steps)
        if first is None:
            lines = [f"{span(self.steps[0].step, self.to)}: weights as committed"]
        else:
            lines = [
                f"{differing} of {len(self.steps)} steps have other weights than committed; the first is step {first.step}: "
                f"{first.digest}, committed {first.committed}",
                *(f"  {cause}" for cause in self.causes),
            ]
        return [*lines, self._metrics_line()]

    def _metrics_line(self) -> str:
        largest = self.largest_differences
        if not largest:
            return "metrics.jsonl has no metrics of these steps to compare with"
        if not any(difference for difference, _ in largest.values()):
            return f"{' and '.join(COMPARED[metric] for metric in largest)} as in metrics.jsonl, to the bit"
        told = [f"{COMPARED[metric]} {difference:.1e} (step {step})" for metric, (difference, step) in largest.items()]
        return f"largest difference from metrics.jsonl: {', '.join(told)}"


def compared(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of `COMPARED` that a step has."""
    return {name: float(value) for name in COMPARED if (value := metrics.get(name)) is not None and math.isfinite(value)}


def span(first: int, last: int) -> str:
    """Steps in words."""
    return f"step {last}" if first == last else f"steps {first} to {last}"
