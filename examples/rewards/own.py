"""A reward of one's own: `reward.function: own:score`, started in this directory, with `reward.options: {close: 0.2}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verst.rewards.metrics import record
from verst.types import Trajectory


def score(trajectory: Trajectory, fields: Mapping[str, Any], close: float = 0.0) -> float:
    """1 for the right number, `close` for one that is off by one."""
    numbers = re.findall(r"-?\d+", trajectory.completion)
    record("has_number", bool(numbers))  # in the run's metrics as score/has_number
    if not numbers:
        return 0.0
    distance = abs(int(numbers[-1]) - int(fields["answer"]))
    return 1.0 if distance == 0 else close if distance == 1 else 0.0
