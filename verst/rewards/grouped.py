"""Rewards that see a whole group at once: those whose first parameter is called `trajectories`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from verst.errors import RewardFailure

PARAMETER = "trajectories"


def scores_groups(reward: Callable[..., Any]) -> bool:
    """Whether it is called with the trajectories of a group, for one number each, and not with one trajectory after the other."""
    try:
        return next(iter(inspect.signature(reward).parameters), None) == PARAMETER
    except ValueError:  # some builtins have no signature
        return False


def one_each(values: Any, count: int, what: str) -> list[Any]:
    """What a function returned for `count` of `what`, as a list. Raises `RewardFailure` if it is not so many values."""
    if not isinstance(values, Sequence) and hasattr(values, "tolist"):
        values = values.tolist()  # an array or a tensor
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise RewardFailure(f"returned {str(values)[:60]!r} for {count} {what}: return a list with one number for each")
    return list(values)
