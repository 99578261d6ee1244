"""Who waits for whom, and since when: what a run that stands still can say of itself."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import NamedTuple


class Wait(NamedTuple):
    """One wait in progress."""

    key: Hashable  # who waits
    awaited: str
    seconds: float


class Waits:
    """What each waiter waits for now. It waits for one thing at a time: a new wait takes the place of the one before."""

    def __init__(self) -> None:
        self._begun: dict[Hashable, tuple[str, float]] = {}

    def begin(self, key: Hashable, awaited: str) -> None:
        self._begun[key] = (awaited, time.monotonic())

    def end(self, key: Hashable) -> None:
        self._begun.pop(key, None)

    def of(self, key: Hashable) -> str | None:
        """What it waits for; None if it is not known to wait."""
        return self._begun[key][0] if key in self._begun else None

    def seconds(self, key: Hashable) -> float:
        """How long it has waited for that; 0 if it is not known to wait."""
        return time.monotonic() - self._begun[key][1] if key in self._begun else 0.0

    def now(self) -> list[Wait]:
        """All of them, the longest first."""
        now = time.monotonic()
        return sorted((Wait(key, awaited, now - begun) for key, (awaited, begun) in self._begun.items()), key=lambda w: -w.seconds)
