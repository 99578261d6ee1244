"""Packing: every sample once, budgets kept, ranks in lockstep, little padding."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verst.data.packing import StepPlan, plan_step, samples_of_rank
from verst.errors import ConfigError, InvariantViolation


def plan(lengths, groups=None, *, minibatches=1, epochs=1, ranks=1, microbatch_tokens=100) -> StepPlan:
    groups = range(len(lengths)) if groups is None else groups
    return plan_step(lengths, list(groups), minibatches=minibatches, epochs=epochs, ranks=ranks, microbatch_tokens=microbatch_tokens)


def cost(microbatch, lengths):
    return len(microbatch) * max((lengths[i] for i in microbatch), default=0)


def test_worked_by_hand():
    # Descending: 30 (sample 1), 20 (3), 10 (0), 10 (2). Budget 40: [30], [20+20 padded] = 40, [10]: three microbatches.
    # One rank must therefore run three; the least largest cost with three is 30: [30], [20], [10, 10].
    result = plan([10, 30, 10, 20], microbatch_tokens=40)
    assert result.updates[0].ranks == (((1,), (3,), (0, 2)),)
    assert result.padding_share == 0


def test_padding_is_reported():
    # One microbatch of 2 rows × 30 tokens holds 40 real ones: 20 of 60 are padding.
    assert plan([30, 10], microbatch_tokens=60).padding_share == pytest.approx(20 / 60)


def test_packed_samples_cost_their_tokens_alone():
    # Descending: 30, 20, 10, 10. Two microbatches fit the budget; the least largest cost with two is 40: [30] and
    # [20 + 10 + 10]. The dearest comes first.
    result = plan_step([10, 30, 10, 20], [0, 1, 2, 3], minibatches=1, epochs=1, ranks=1, microbatch_tokens=50, packed=True)
    assert result.updates[0].ranks == (((3, 0, 2), (1,)),)
    assert result.padding_share == 0


def test_ranks_deal_to_and_fro():
    # Budget 10, two ranks: costs 10 9 | 8 7 | 6 5. Round one goes 10 to rank 0, round two starts with rank 1.
    ranks = plan([10, 9, 8, 7, 6, 5], ranks=2, microbatch_tokens=10).updates[0].ranks
    assert ranks == (((0,), (3,), (4,)), ((1,), (2,), (5,)))


def test_a_batch_that_fits_one_forward_is_still_shared_by_all_ranks():
    assert plan([5, 5, 5, 5], ranks=4).updates[0].ranks == (((0,),), ((1,),), ((2,),), ((3,),))
    assert plan([5, 5, 5, 5, 5], ranks=4).updates[0].samples == (0, 1, 2, 3, 4)
    assert all(microbatches != ((),) for microbatches in plan([5] * 5, ranks=4).updates[0].ranks)


def test_too_few_samples_leave_a_dummy():
    assert plan([5], ranks=2).updates[0].ranks == (((0,),), ((),))


def test_groups_stay_whole_and_in_order():
    result = plan([1] * 7, [4, 4, 9, 9, 9, 2, 2], minibatches=3)
    assert [u.samples for u in result.updates] == [(0, 1), (2, 3, 4), (5, 6)]


def test_a_minibatch_without_samples_has_no_microbatches():
    result = plan([3], [0], minibatches=2, ranks=2)
    assert [u.samples for u in result.updates] == [(), (0,)]
    assert result.updates[0].ranks == ((), ())
    assert plan([]).padding_share == 0


def test_too_long_a_sample_is_named():
    with pytest.raises(ConfigError, match=r"sample 1 of the batch \(group 8\) has 101 tokens.*train\.microbatch_tokens is 100"):
        plan([3, 101], [7, 8])


@pytest.mark.parametrize(
    ("lengths", "groups", "ranks"), [([1, 2], [0], 1), ([0], [0], 1), ([1], [0], 0)], ids=["ragged", "empty sample", "no ranks"]
)
def test_nonsense_is_refused(lengths, groups, ranks):
    with pytest.raises(InvariantViolation, match="packing"):
        plan(lengths, groups, ranks=ranks)


cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), max_size=40),
        "group_size": st.integers(1, 5),
        "minibatches": st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "ranks": st.integers(1, 5),
        "microbatch_tokens": st.integers(60, 300),
    }
)


def plan_case(case):
    groups = [i // case["group_size"] for i in range(len(case["lengths"]))]
    return plan_step(
        case["lengths"],
        groups,
        minibatches=case["minibatches"],
        epochs=case["epochs"],
        ranks=case["ranks"],
        microbatch_tokens=case["microbatch_tokens"],
    ), groups


@given(cases)
@settings(max_examples=150, deadline=None)
@example({"lengths": [1], "group_size": 1, "minibatches": 4, "epochs": 2, "ranks": 5, "microbatch_tokens": 60})
def test_properties(case):
    lengths, minibatches = case["lengths"], case["minibatches"]
    result, groups = plan_case(case)
    assert len(result.updates) == minibatches * case["epochs"]
    assert result.updates == result.updates[:minibatches] * case["epochs"]  # every epoch alike
    first = result.updates[:minibatches]
    assert sorted(i for update in first for i in update.samples) == list(range(len(lengths)))  # each sample once an epoch
    owner = {groups[i]: u for u, update in enumerate(first) for i in update.samples}
    assert all(owner[groups[i]] == u for u, update in enumerate(first) for i in update.samples)  # groups whole
    for update in first:
        assert len(update.ranks) == case["ranks"]
        assert len({len(microbatches) for microbatches in update.ranks}) == 1  # lockstep
        flat = [m for microbatches in update.ranks for m in microbatches]
        assert all(cost(m, lengths) <= case["microbatch_tokens"] for m in flat)
        assert (() in flat) <= (len(update.samples) < len(flat))  # a dummy only where samples are too few
    owned = [samples_of_rank(result, r) for r in range(case["ranks"])]
    assert sorted(i for samples in owned for i in samples) == list(range(len(lengths)))
    assert plan_case(case)[0] == result


def fewest(lengths, limit):
    """Fewest runs of descending lengths that cost at most `limit` each, by trying every last run: an independent search."""
    ordered = sorted(lengths, reverse=True)
    best = [0]
    for end in range(1, len(ordered) + 1):
        best.append(min(best[start] + 1 for start in range(end) if (end - start) * ordered[start] <= limit))
    return best[-1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(30, 120), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_no_plan_over_sorted_samples_has_fewer_rounds_or_a_smaller_peak(lengths, budget, ranks):
    update = plan(lengths, ranks=ranks, microbatch_tokens=budget).updates[0]
    rounds = len(update.ranks[0])
    assert rounds == -(-fewest(lengths, budget) // ranks)
    peak = max(cost(m, lengths) for microbatches in update.ranks for m in microbatches)
    assert peak == max(lengths) or fewest(lengths, peak - 1) > rounds * ranks


def test_sorting_keeps_padding_small():
    # 64 lengths spread evenly over 16..512: paired at random about half of the forward would be padding.
    lengths = [16 + (i * 37 % 64) * 496 // 63 for i in range(64)]
    assert plan(lengths, [i // 8 for i in range(64)], microbatch_tokens=4096, ranks=2).padding_share < 0.15
