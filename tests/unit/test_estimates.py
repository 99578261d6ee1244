"""pass@k and confidence intervals against numbers worked by hand and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest

from verst.algorithms.estimates import mean_interval, pass_at_k, share_interval, wilson


def test_pass_at_k_by_hand():
    # 4 samples, 1 right: of the 6 pairs 3 have it. 5 samples, 2 right: of the 10 triples only one has none.
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(5, 2, 3) == 0.9
    assert [pass_at_k(3, c, 3) for c in range(4)] == [0, 1, 1, 1]
    assert pass_at_k(3, 0, 1) == 0


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (7, 1, 4), (8, 5, 2), (200, 3, 100)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int):
    if n < 10:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(map(any, draws)) / len(draws)
    else:  # the product of Chen et al.'s own program
        expected = 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1)])
def test_pass_at_k_of_too_many_is_an_error(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="k must be 1 to the number of samples"):
        pass_at_k(n, c, k)


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: z² = 3.841459; center (0.8 + 0.192073) / 1.384146 = 0.716740;
    # half 1.959964 / 1.384146 · sqrt(0.016 + 0.00960365) = 0.226577. Wilson 1927; the usual table gives (0.490, 0.943).
    assert wilson(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=2e-6)
    assert wilson(1.0, 10) == pytest.approx((0.722467, 1.0), abs=2e-6)  # 10 / (10 + z²)


def test_one_sample_a_prompt_is_wilsons_interval():
    found = share_interval([1.0] * 8 + [0.0] * 2)
    assert (found.low, found.high) == pytest.approx(wilson(0.8, 10))
    assert (found.value, found.prompts) == (0.8, 10)


def test_prompts_that_agree_count_more_and_unanimous_ones_keep_a_width():
    # values 0.4 and 0.6: p = 0.5, variance of the mean 0.01 / 2 = 0.005, effective number 0.25 / 0.005 = 50
    agreeing = share_interval([0.4, 0.6])
    assert (agreeing.low, agreeing.high) == pytest.approx(wilson(0.5, 50))
    assert share_interval([1.0] * 10).low == pytest.approx(0.722467, abs=2e-6)
    assert share_interval([0.0] * 10).high == pytest.approx(1 - 0.722467, abs=2e-6)
    assert share_interval([0.25] * 10).low == pytest.approx(wilson(0.25, 10)[0])


def test_the_interval_of_a_mean_by_hand():
    # 1, 2, 3: mean 2, sample variance 1, standard error 1 / sqrt(3) = 0.577350, times 1.959964 = 1.131586
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 0.868414, 3.131586), abs=1e-6)
    alone = mean_interval([5.0])
    assert (alone.value, alone.low, alone.high) == (5.0, -math.inf, math.inf)
