"""Rewards that reward processes import by name: in a module that imports next to nothing, so that they start fast."""

from __future__ import annotations

import time
from typing import Any


def spread(trajectory: Any, fields: Any) -> float:
    """Varies between the members of a group, so that every step has a gradient."""
    return float(sum(map(ord, trajectory.completion)) % 7)


def slow(trajectory: Any, fields: Any) -> float:
    """The same, taking so long that a step of four trajectories takes a fifth of a second on any machine."""
    time.sleep(0.05)
    return spread(trajectory, fields)


def steady(trajectory: Any, fields: Any) -> float:
    """As `spread`, taking so long that groups are still scored when the first one of their step is."""
    time.sleep(0.01)
    return spread(trajectory, fields)


def tied_in_odd_groups(trajectory: Any, fields: Any) -> float:
    """By member 0, 1, 2 …, and in every other group all equal."""
    group, member = map(int, trajectory.id.split("/"))
    return 0.0 if group % 2 else float(member)


def ranked(trajectories: Any, fields: Any) -> list[int]:
    """The place of each in its group, by the alphabet."""
    order = sorted(range(len(trajectories)), key=lambda i: (trajectories[i].completion, i))
    return [order.index(i) for i in range(len(trajectories))]
