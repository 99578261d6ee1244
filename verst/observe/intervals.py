"""Sets of points in time, as sorted lists of `(begin, end)` that do not touch. Seconds of one clock."""

from __future__ import annotations

from collections.abc import Iterable

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
    left: list[Interval] = []
    taken = union(second)
    for begin, end in union(first):
        for start, stop in taken:
            if stop <= begin or start >= end:
                continue
            if start > begin:
                left.append((begin, start))
            begin = stop
        if begin < end:
            left.append((begin, end))
    return left


def total(intervals: Iterable[Interval]) -> float:
    """Seconds that they cover together."""
    return sum(end - begin for begin, end in union(intervals))
