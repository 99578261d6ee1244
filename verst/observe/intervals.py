"""Sets of points in time, as sorted lists of `(begin, end)` that do not touch. Seconds of one clock."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any of them covers. Those that are empty, or end before they begin, cover nothing."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def common(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """What both cover."""
    one, other = union(first), union(second)
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """What the first cover and the second do not."""
    taken = union(second)
    begins, ends = [-math.inf, *(end for _, end in taken)], [*(begin for begin, _ in taken), math.inf]
    return common(first, zip(begins, ends, strict=True))


def total(intervals: Iterable[Interval]) -> float:
    """Seconds that they cover together."""
    return sum(end - begin for begin, end in union(intervals))


def passed(intervals: Iterable[Interval]) -> Callable[[float], float]:
    """A function of time: how many of their seconds have passed by then."""
    merged = union(intervals)
    begins = [begin for begin, _ in merged]
    before = [0.0, *accumulate(end - begin for begin, end in merged)]

    def at(time: float) -> float:
        count = bisect_right(begins, time)  # of intervals that have begun
        return before[count] - max(0.0, merged[count - 1][1] - time) if count else 0.0

    return at
