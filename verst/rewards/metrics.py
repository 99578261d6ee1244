"""What a reward tells beside its number: components, costs, anything of which a mean over trajectories is worth seeing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from verst.errors import RewardFailure

PREFIX = "score/"
"""Opens the metric's name in a run's metrics, and its key in `trajectory.info`, where the value is kept."""

_current: ContextVar[dict[str, float] | None] = ContextVar("reward_metrics", default=None)


def record(name: str, value: float) -> None:
    """Adds `value` to metric `score/NAME` of the trajectory that is being scored; its step reports the mean over those that have it.

    Values recorded more than once for one trajectory are summed. Outside of a run, as in a test of one's own, nothing is recorded.
    Raises `RewardFailure` if the value is not a finite number.
    """
    number = float(value)
    if not math.isfinite(number):
        raise RewardFailure(f"records {number} as metric {name!r}, not a finite number: record one")
    recorded = _current.get()
    if recorded is not None:
        recorded[PREFIX + name] = recorded.get(PREFIX + name, 0.0) + number


@contextmanager
def recording() -> Iterator[dict[str, float]]:
    """What is recorded inside, in this task and those that it starts."""
    recorded: dict[str, float] = {}
    token = _current.set(recorded)
    try:
        yield recorded
    finally:
        _current.reset(token)
