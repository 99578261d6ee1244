"""Metrics that merge exactly: a weighted mean is kept as sum and weight until it is reported.

Averages of averages are wrong once microbatches or ranks differ in size, so nobody divides before the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Weighted means, maxima and effective sample sizes by metric name. Plain floats, so it pickles and merges cheaply."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    moments: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Count, sum and sum of squares of importance weights."""
    notes: dict[str, None] = field(default_factory=dict)
    """Lines for a person, in order, each once."""

    def mean(self, name: str, total: float, weight: float = 1.0) -> None:
        """Adds `total` (a sum over `weight` items) to the mean called `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def peak(self, name: str, value: float) -> None:
        """Keeps the largest value seen; NaN wins, so that it is never hidden."""
        value = float(value)
        known = self.maxima.get(name, -math.inf)
        self.maxima[name] = value if math.isnan(value) or value > known else known

    def effective(self, name: str, count: float, total: float, squares: float) -> None:
        """Adds `count` importance weights, by their sum and sum of squares, to the effective sample size called `name`.

        Reported as the share total² / (count · squares): 1 if all weights are equal, 1 / count if one holds everything.
        """
        known = self.moments.get(name, (0.0, 0.0, 0.0))
        self.moments[name] = (known[0] + float(count), known[1] + float(total), known[2] + float(squares))

    def note(self, line: str) -> None:
        """Adds a line for a person; one that others tell too comes once."""
        self.notes[line] = None

    def merge(self, other: Tally) -> Tally:
        """Adds another tally (of a microbatch or rank) to this one, and returns this one."""
        for name, total in other.sums.items():
            self.mean(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.peak(name, value)
        for name, moments in other.moments.items():
            self.effective(name, *moments)
        self.notes |= other.notes
        return self

    def report(self) -> dict[str, float]:
        """All metrics by name. A mean over nothing is left out: it is unknown, not 0. So is an effective size of nothing."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name]}
        shares = {name: total * total / (count * squares) for name, (count, total, squares) in self.moments.items() if count * squares}
        return means | self.maxima | shares


def merged(tallies: Iterable[Tally]) -> Tally:
    """One tally of many. The inputs are left as they are."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total
