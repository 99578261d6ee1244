"""A reward that compares the answers of a group: `reward.function: group:shortest_right`, started in this directory.

Its first parameter is called `trajectories`, so it is given all of a group at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verst.rewards.metrics import record
from verst.types import Trajectory


def shortest_right(trajectories: Sequence[Trajectory], fields: Mapping[str, Any], bonus: float = 0.5) -> list[float]:
    """1 for a right answer, and `bonus` more for the shortest of the right ones."""
    right = [trajectory.completion.strip() == fields["answer"] for trajectory in trajectories]
    record("right", sum(right) / len(right))
    lengths = [trajectory.generated_tokens for trajectory in trajectories]
    shortest = min((length for length, is_right in zip(lengths, right, strict=True) if is_right), default=0)
    return [is_right * (1 + bonus * (length == shortest)) for length, is_right in zip(lengths, right, strict=True)]
