"""What stands out among its like: a gradient among those before it, a trainer rank or a replica among the others."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verst.observe.intervals import total, union
from verst.observe.recorded import GroupLife

LAYER_US = "train/layer_us"
"""Microseconds that a trainer rank's forward takes for one token in one layer."""

_NORMS = 50
"""Gradient norms that a median is of; at least `_FEWEST_NORMS` of them."""
_FEWEST_NORMS = 10
_SPIKE = 10.0
"""Times the median: on real runs the norms of healthy steps differ by less."""
_SLOW = 1.5
"""Times as slow as the others, for `_STEPS` steps in a row: one step may have an uneven batch."""
_STEPS = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a trainer rank is in a call. `waits`: one of its threads is in a collective, as far as Python's stacks tell."""

    passed: int  # layers, in all microbatches so far
    waits: bool


def slowest(paces: Mapping[int, float]) -> tuple[float, int] | None:
    """Of seconds a token by number: how many times the median of the others the slowest takes, and who it is. None: there are no others."""
    if len(paces) < 2:
        return None
    who = max(paces, key=lambda number: paces[number])
    others = statistics.median(pace for number, pace in paces.items() if number != who)
    return (paces[who] / others, who) if others > 0 else None


def replica_paces(lives: Sequence[GroupLife]) -> dict[int, float]:
    """Seconds a token of each replica, by its number, while it generated these groups."""
    paces = {}
    for number in sorted({life.replica for life in lives}):
        own = [life for life in lives if life.replica == number]
        tokens, seconds = sum(life.tokens for life in own), total(union(life.generation for life in own))
        if tokens and seconds > 0:
            paces[number] = seconds / tokens
    return paces


class Outliers:
    """Looks at each step's row. A slow one is told of once, and again if it was not slow in between."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_NORMS)
        self._slow: dict[str, tuple[int, list[float]]] = {"train": (-1, []), "rollout": (-1, [])}
        """Of each side: who, and how many times as slow in each step of the row; in a longer row than is told of, in the last ones."""

    def look(self, step: int, row: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """More metrics of the step, and lines for a person."""
        metrics, lines = self._spike(step, row.get("update/grad_norm"))
        for side, said in (
            (
                "train",
                "trainer rank {} is slow: its layers have taken at least {:.1f} times as long for a token as those of the others",
            ),
            ("rollout", "replica {} is slow: it has taken at least {:.1f} times as long for a token as the others"),
        ):
            lines += self._streak(side, said, row.get(f"{side}/straggler_ratio"), row.get(f"{side}/straggler"))
        return metrics, lines

    def _spike(self, step: int, norm: float | None) -> tuple[dict[str, float], list[str]]:
        if norm is None:
            return {}, []
        before = statistics.median(self._norms) if len(self._norms) >= _FEWEST_NORMS else 0.0
        self._norms.append(norm)
        if before <= 0:
            return {}, []
        ratio = norm / before
        line = f"step {step}: the gradient's norm is {ratio:.0f} times what is usual ({norm:.3g}, median {before:.3g}) before it is clipped"
        return {"update/grad_norm_ratio": ratio}, [line] if ratio > _SPIKE else []

    def _streak(self, side: str, said: str, ratio: float | None, who: float | None) -> list[str]:
        known, ratios = self._slow[side]
        if ratio is None or who is None or ratio <= _SLOW:
            self._slow[side] = -1, []
            return []
        ratios = [*ratios[-_STEPS:], ratio] if who == known else [ratio]
        self._slow[side] = int(who), ratios
        # The least of them: a process that has just begun, or one uneven batch, makes one step hundreds of times as slow.
        return [f"{said.format(int(who), min(ratios))}, for {_STEPS} steps now"] if len(ratios) == _STEPS else []
