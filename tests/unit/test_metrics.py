"""Metrics merge to the same numbers however the work was split."""

from __future__ import annotations

import math

from verst.observe.metrics import Tally, merged


def test_means_are_weighted_over_unequal_parts():
    # 1 token with loss 5 on one rank, 3 tokens with losses summing to 3 on the other: (5 + 3) / 4 = 2, not (5 + 1) / 2 = 3
    a, b = Tally(), Tally()
    a.mean("loss", 5.0, 1)
    b.mean("loss", 3.0, 3)
    assert merged([a, b]).report() == {"loss": 2.0}
    assert a.report() == {"loss": 5.0}  # the parts are left as they were


def test_a_mean_over_nothing_is_unknown_not_zero():
    tally = Tally()
    tally.mean("reward", 0.0, 0)
    assert tally.report() == {}


def test_nan_is_never_hidden_by_a_larger_number():
    tally = Tally()
    tally.peak("worst", math.nan)
    tally.peak("worst", 3.0)
    assert math.isnan(tally.report()["worst"])
