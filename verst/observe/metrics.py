"""Metrics that merge exactly: a weighted mean is kept as sum and weight until it is reported.

Averages of averages are wrong once microbatches or ranks differ in size, so nobody divides before the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Weighted means and maxima by metric name. Plain floats, so it pickles and merges cheaply."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str, total: float, weight: float = 1.0) -> None:
        """Adds `total` (a sum over `weight` items) to the mean called `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def peak(self, name: str, value: float) -> None:
        """Keeps the largest value seen; NaN wins, so that it is never hidden."""
        value = float(value)
        known = self.maxima.get(name, -math.inf)
        self.maxima[name] = value if math.isnan(value) or value > known else known

    def merge(self, other: Tally) -> Tally:
        """Adds another tally (of a microbatch or rank) to this one, and returns this one."""
        for name, total in other.sums.items():
            self.mean(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.peak(name, value)
        return self

    def report(self) -> dict[str, float]:
        """Means and maxima by name. A mean over nothing is left out: it is unknown, not 0."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name]}
        return means | self.maxima


def merged(tallies: Iterable[Tally]) -> Tally:
    """One tally of many. The inputs are left as they are."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total
