"""A training hook of one's own: `hooks.classes: {"smoothed:Smoothed": {metric: reward, weight: 0.1}}`, started in this directory."""

from __future__ import annotations

from collections.abc import Mapping


class Smoothed:
    """A metric's exponential moving average, in the run's metrics as custom/smoothed/NAME. Begins anew when the run is resumed."""

    def __init__(self, metric: str = "reward", weight: float = 0.1) -> None:
        self._metric, self._weight = metric, weight
        self._mean: float | None = None

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        value = metrics.get(self._metric)
        if value is None:
            return None
        self._mean = value if self._mean is None else self._mean + self._weight * (value - self._mean)
        return {f"smoothed/{self._metric}": self._mean}
