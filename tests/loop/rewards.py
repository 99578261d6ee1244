"""Rewards that reward processes import by name: in a module that imports nothing, so that they start fast."""

from __future__ import annotations

from typing import Any


def spread(trajectory: Any, fields: Any) -> float:
    """Varies between the members of a group, so that every step has a gradient."""
    return float(sum(map(ord, trajectory.completion)) % 7)
