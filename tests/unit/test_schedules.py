"""The benchmarks of running ahead: their bound, worked by hand, and a small soak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.async_speedup import BATCH, Work, configured
from benchmarks.soak import soaked


def work(*late: tuple[int, float], steps: int = 2, places: int = 10_000) -> Work:
    """Every trajectory takes 1 s but those of the `late` groups; a training step takes 1 s."""
    rolls_s = np.ones((steps * BATCH, 8))
    for group, seconds in late:
        rolls_s[group, 3] = seconds
    return Work(rolls_s, 1.0, places)


@pytest.mark.parametrize(
    ("late", "capacity", "window", "seconds"),
    [
        ((), 16, 1, 4.0),  # roll, train, roll, train
        ((), 32, 1, 3.0),  # the second batch is rolled beside the first
        (((5, 4.0),), 16, 1, 7.0),
        (((5, 4.0),), 32, 1, 6.0),  # the first step waits for it, and with it all
        (((5, 4.0),), 48, 11, 6.0),  # step 1 needs the groups below 6, and 5 is one of them
        (((5, 4.0),), 48, 12, 5.0),  # it may pass to step 2, which needs it then
        (((20, 4.0),), 32, 1, 5.0),  # rolled from the beginning, and trained after 4 s
        (((20, 4.0),), 16, 1, 7.0),  # admitted only after the first step
    ],
)
def test_the_longest_chain_by_hand(late: tuple[tuple[int, float], ...], capacity: int, window: int, seconds: float):
    assert work(*late).bound_s(capacity, window) == pytest.approx(seconds)


def test_few_places_or_long_training_bound_it_too():
    assert work(places=8).bound_s(32, 1) == pytest.approx(32 * 8 / 8)
    drawn = Work.draw(steps=5, train_s=0.5, places=64, sigma=1.0)
    assert drawn.rolls_s.sum() / 64 == pytest.approx(5 * 0.5)  # generation and training take as long
    assert drawn.bound_s(48, 16) >= 5 * 0.5


def test_schedules_are_those_that_init_writes():
    bounds = [configured(work(), batches, window).worst_staleness for batches, window in ((1, 1), (2, 1), (3, BATCH))]
    assert bounds == [0, 1, 3]


@pytest.mark.slow
def test_a_soak_loses_nothing(tmp_path: Path):
    result = soaked(480, tmp_path)
    assert result["groups"] == 480
    assert 0 < result["dropped"] < 100
    assert 1 <= result["staleness"] <= result["staleness_bound"] == 3
