"""The filters shipped with Verst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verst.errors import ConfigError
from verst.types import Group, Trajectory


class Length:
    """Leaves out trajectories with fewer or more trained tokens, branches included, than these bounds. None: no such bound.

    It works against the answers that it leaves out, whatever their reward is: `bias/length` shows by how much.
    """

    def __init__(self, min_tokens: int | None = None, max_tokens: int | None = None) -> None:
        for name, value in {"min_tokens": min_tokens, "max_tokens": max_tokens}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"filter length: {name} is {value!r}: give a whole number above 0, or leave it out")
        if min_tokens is None and max_tokens is None:
            raise ConfigError("filter length: it has no bound: give min_tokens, max_tokens or both")
        if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
            raise ConfigError(f"filter length: min_tokens ({min_tokens}) is above max_tokens ({max_tokens}): it would leave nothing")
        self._least, self._most = min_tokens, max_tokens

    def __call__(self, group: Group) -> Mapping[int, str]:
        reasons = {member: self._reason(t) for member, t in enumerate(group.trajectories)}
        return {member: reason for member, reason in reasons.items() if reason is not None}

    def _reason(self, trajectory: Trajectory) -> str | None:
        tokens = sum(int(one.loss_mask_T.sum()) for one in trajectory.sequences)
        if self._least is not None and tokens < self._least:
            return f"fewer than {self._least} tokens"
        if self._most is not None and tokens > self._most:
            return f"more than {self._most} tokens"
        return None


class Duplicates:
    """Drops a group of which more than the share `limit` repeats other completions of it, token for token.

    Such a group compares a few answers, however many trajectories it has; the sign of a policy that has collapsed on them. Single copies
    stay: a likely answer comes more than once, and its weight is part of the policy gradient.
    """

    def __init__(self, limit: float = 0.5) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < 1:
            raise ConfigError(f"filter duplicates: limit is {limit!r}: give a share from 0 to below 1")
        self._limit = limit

    def __call__(self, group: Group) -> str | None:
        tokens = [tuple(one.tokens_T[one.loss_mask_T].tobytes() for one in t.sequences) for t in group.trainable]
        if len(tokens) - len(set(tokens)) <= self._limit * len(tokens):
            return None
        return f"more than the share {self._limit:g} of its completions are copies"


SHIPPED: Mapping[str, Any] = {"duplicates": Duplicates, "length": Length}
"""By the names that a run file has."""
