"""A filter of one's own: `filters.functions: {"refusals:refusals": {share: 0.5}}`, started in this directory."""

from __future__ import annotations

from collections.abc import Mapping

from verst.types import Group

OPENINGS = ("I cannot", "I can't", "I'm sorry", "As an AI")


def refusals(group: Group, share: float = 0.5) -> str | Mapping[int, str] | None:
    """Leaves out answers that refuse; drops the group if more than this share of it does."""
    found = [m for m, t in enumerate(group.trajectories) if t.completion.strip().startswith(OPENINGS)]
    if len(found) > share * len(group.trajectories):
        return "most answers refuse"
    return dict.fromkeys(found, "refuses")
