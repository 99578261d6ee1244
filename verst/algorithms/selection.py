"""Which groups a batch takes, and which samples of a group are trained: decided from rewards alone, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

_EQUAL = 1e-8  # rewards that differ by less are one


def all_equal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are all equal, so that every advantage is 0. Not of a group that has none."""
    return bool(rewards) and max(rewards) - min(rewards) < _EQUAL


def best_and_worst(rewards: Sequence[float]) -> tuple[int, ...]:
    """The indices, ascending, of the largest and the smallest reward, of equal ones the first; none if all are equal."""
    if not rewards or all_equal(rewards):
        return ()
    places = range(len(rewards))
    return tuple(sorted((max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__))))


def best(rewards: Sequence[float]) -> tuple[int, ...]:
    """The index of the largest reward. Of equal ones it is the first: the samples of a group are drawn alike, so that is one at random."""
    return (max(range(len(rewards)), key=rewards.__getitem__),) if rewards else ()
