"""Each algorithm against its paper: numbers worked by hand, and formulas written again in NumPy, with gradients by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from verst.algorithms.advantages import batch_normalised, leave_one_out_advantages, shortened_rewards
from verst.algorithms.aggregate import token_weights
from verst.algorithms.losses import LossInputs
from verst.algorithms.selection import all_equal, best
from verst.algorithms.table import ALGORITHMS
from verst.config.algorithms import PRESETS
from verst.config.load import load_config
from verst.errors import InvariantViolation
from verst.runtime.batching import advantages
from verst.types import Batch, Sample

SAMPLES = np.array([0, 0, 0, 1, 1, 2])
"""Three samples, of three, two and one loss tokens."""
LENGTHS = np.array([3, 2, 1])
LIMIT = 4
POLICY_GRADIENTS = [name for name in PRESETS if name not in ("distill", "best_of_n", "sft", "dpo", "online_dpo")]


def options_of(name: str, **asked: Any) -> Any:
    needed = {"teacher": "m"} if name == "distill" else {}
    return PRESETS[name].model_validate({"name": name, **needed, **asked})


def loss_of(name: str, log_ratios: Any, values: Any, samples: Any = SAMPLES, **asked: Any) -> tuple[Any, torch.Tensor]:
    """The output, and the log-probabilities [N] that it can be differentiated by; the old ones are −1, −2, −3 …"""
    old = -torch.arange(1.0, len(log_ratios) + 1, dtype=torch.float64)
    logprobs = (old + torch.as_tensor(np.asarray(log_ratios), dtype=torch.float64)).requires_grad_()
    each = torch.as_tensor(np.asarray(values, dtype=np.float64)[samples])
    of_N = torch.as_tensor(samples)
    inputs = LossInputs(logprobs, old, old, None, each, of_N, of_N)
    return ALGORITHMS[name].loss(inputs, options_of(name, **asked)), logprobs


def weights_of(mode: Any) -> NDArray[np.float64]:
    """[N] of the loss tokens."""
    masks = [np.array([False, *[True] * n]) for n in LENGTHS]
    weights = token_weights(masks, range(len(masks)), mode, LIMIT)
    return np.concatenate([w[m] for w, m in zip(weights, masks, strict=True)]).astype(np.float64)


def update_loss(name: str, log_ratios: Any, values: Any, **asked: Any) -> tuple[float, NDArray[np.float64]]:
    """The loss of an update of the three samples, as a backend sums it, and its gradient [N] by the log-probabilities."""
    output, logprobs = loss_of(name, log_ratios, values, **asked)
    total = (torch.as_tensor(weights_of(options_of(name, **asked).aggregate)) * output.per_token).sum()
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.item(), gradient.numpy()


def differences(objective: Callable[[NDArray[np.float64]], float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The gradient by central differences."""
    step = 1e-6
    return np.array([(objective(at + step * unit) - objective(at - step * unit)) / (2 * step) for unit in np.eye(len(at))])


# ---- advantages


def test_leave_one_out_worked_by_hand():
    # Group 5: rewards 1 0 0, the others' means 0, ½, ½. Group 2: 3 and 1. They interleave.
    found = leave_one_out_advantages([1, 3, 0, 0, 1], [5, 2, 5, 5, 2])
    np.testing.assert_allclose(found, [1, 2, -0.5, -0.5, -2])
    assert leave_one_out_advantages([0.1, 0.1, 0.1, 42.0], [0, 0, 0, 1]).tolist() == [0, 0, 0, 0]
    with pytest.raises(InvariantViolation, match="group numbers"):
        leave_one_out_advantages([0.0, 1.0], [0])


def test_batch_normalisation_worked_by_hand():
    # 1 2 3 6: mean 3, squares of what is left 4 1 0 9, sample deviation √(14/3).
    np.testing.assert_allclose(batch_normalised([1, 2, 3, 6]), np.array([-2, -1, 0, 3]) / np.sqrt(14 / 3), rtol=1e-6)
    assert batch_normalised([0.1, 0.1, 0.1]).tolist() == [0, 0, 0]
    assert batch_normalised([]).tolist() == []
    with pytest.raises(InvariantViolation, match=r"samples \[1\] are not finite"):
        batch_normalised([0.0, np.nan])


# Group 0: rewards 4 2, mean 3, deviation √2. Group 1: 1 0 0 and −1, mean 0, squares 1 + 0 + 0 + 1, deviation √(2/3).
OF_THE_GROUP = [1 / np.sqrt(2), -1 / np.sqrt(2), *(np.array([1, 0, 0, -1]) / np.sqrt(2 / 3))]
ADVANTAGES: dict[str, Any] = {
    **dict.fromkeys(["grpo", "dapo", "gspo", "cispo"], OF_THE_GROUP),
    "dr_grpo": [1, -1, 1, 0, 0, -1],
    "rloo": [2, -2, 4 / 3, 0, 0, -4 / 3],  # n / (n − 1) times as much
    # All six: mean 1, 3 1 0 −1 −1 −2 left, squares 16 in all, divisor 5.
    "reinforce_plus_plus": np.array([3, 1, 0, -1, -1, -2]) / np.sqrt(16 / 5),
    # Less the group's means: 1 −1 1 0 0 −1, mean 0, squares 4 in all, divisor 5.
    "reinforce_plus_plus_baseline": np.array([1, -1, 1, 0, 0, -1]) / np.sqrt(4 / 5),
    "ppo": [4, 2, 1, 0, 0, -1],  # what the last token has earned: the critic's values make it advantages
    "distill": [0] * 6,  # the loss has those of the tokens
    **dict.fromkeys(["best_of_n", "sft"], [1] * 6),
    "online_dpo": [1, -1, 1, 0, 0, -1],  # signs; batches have groups of two
    "dpo": [1, -1, 1, 0, 0, -1],
}


@pytest.mark.parametrize("name", PRESETS)
def test_advantages_by_the_table(name: str):
    rewards, groups = [4, 2, 1, 0, 0, -1], np.array([0, 0, 1, 1, 1, 1])
    found = ALGORITHMS[name].advantages(rewards, groups, options_of(name))
    np.testing.assert_allclose(found, ADVANTAGES[name], rtol=3e-6, atol=1e-12)


def test_the_overlong_punishment_worked_by_hand():
    # The paper's 16,384 + 4,096 tokens: none up to the first, ½ halfway through the cache, 1 at the end and beyond.
    tokens = np.array([100, 16_384, 18_432, 20_480, 30_000])
    found = shortened_rewards([1, 1, 1, 1, -1], tokens / 20_480, share=4096 / 20_480)
    np.testing.assert_allclose(found, [1, 1, 0.5, 0, -2], atol=1e-12)
    assert shortened_rewards([1.0, 0.0], [1.0, 0.5], share=0.0).tolist() == [1.0, 0.0]
    with pytest.raises(InvariantViolation, match="overlong punishment"):
        shortened_rewards([1.0, 0.0], [1.0], share=0.2)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_every_policy_gradient_can_shorten_answers(name: str):
    shaped = ALGORITHMS[name].shape_rewards([1.0, 1.0], {}, [0.5, 1.0], options_of(name, overlong_share=0.5))
    assert shaped.tolist() == [1.0, 0.0]


def test_the_lengths_of_a_batch_reach_its_advantages():
    """Answers of 4, 6 and 8 of 8 tokens in two turns, all right: with a share of a half they are worth 1, ½ and 0."""
    config = load_config(
        {"run": {"steps": 1}, "model": {"path": "m"}, "algorithm": {"name": "dr_grpo", "overlong_share": 0.5}},
        ["rollout.max_new_tokens=4", "rollout.max_turns=2"],
    )
    samples = [sample_of(name, tokens, 1.0) for name, tokens in (("short", 4), ("middling", 6), ("long", 8))]
    np.testing.assert_allclose(advantages(Batch(1, (0,), tuple(samples)), config, {}), [0.5, 0, -0.5])


def sample_of(name: str, tokens: int, reward: float) -> Sample:
    """A prompt of three tokens, and so many generated ones."""
    mask_T = np.arange(3 + tokens) >= 3
    zeros_T = np.zeros(3 + tokens, dtype=np.int32)
    return Sample(name, 0, zeros_T, mask_T, zeros_T.astype(np.float32), zeros_T, reward)


# ---- which groups and samples


def test_the_best_of_a_group():
    assert best([0.0, 2.0, 1.0]) == (1,)
    assert best([0.0, 1.0, 1.0]) == (1,)  # the first of equal ones, of whatever length
    assert best([]) == ()
    assert (all_equal([0.1 + 0.2, 0.3]), all_equal([0.0, 1.0]), all_equal([])) == (True, False, False)


@pytest.mark.parametrize("name", PRESETS)
def test_which_groups_have_nothing_to_teach(name: str):
    def dropped(rewards: list[float], **asked: Any) -> str | None:
        return ALGORITHMS[name].without_signal(rewards, options_of(name, **asked))

    if name == "best_of_n":
        assert dropped([0.0, -1.0]) == "its best reward (0.0) is not above 0.0"
        assert dropped([0.5, 0.0], reward_above=0.5) == "its best reward (0.5) is not above 0.5"
        assert dropped([1.0, 1.0]) is None  # right answers are to be imitated, also if all are
    elif name in ("online_dpo", "dpo"):
        assert dropped([1.0, 1.0]) == "all its rewards are equal (1.0), so no two make a pair"
        assert dropped([1.0, 0.0]) is None
    elif name in ("sft", "distill", "reinforce_plus_plus", "ppo"):
        assert dropped([1.0, 1.0]) is None
    else:
        assert dropped([1.0, 1.0], dynamic_sampling=True) == "all its rewards are equal (1.0)"
        assert dropped([1.0, 0.0], dynamic_sampling=True) is None
        assert dropped([1.0, 1.0], dynamic_sampling=False) is None


# ---- losses


def test_dr_grpo_divides_by_a_constant():
    # arXiv 2503.20783: Σ over tokens of A, over sequences times the limit: −(3·1 + 2·(−2) + 1·0.5) / (3·4), every ratio being 1.
    total, gradient = update_loss("dr_grpo", np.zeros(6), [1, -2, 0.5])
    assert total == pytest.approx(0.5 / 12)
    np.testing.assert_allclose(gradient, -np.array([1, 1, 1, -2, -2, 0.5]) / 12)
    # GRPO's paper gives the tokens of a short sequence more: −A / (3 · length).
    _, paper = update_loss("grpo", np.zeros(6), [1, -2, 0.5], aggregate="sequence_mean")
    np.testing.assert_allclose(paper, -np.array([1 / 3, 1 / 3, 1 / 3, -1, -1, 0.5]) / 3, rtol=1e-6)


def test_dapo_clips_higher():
    # Ratios 1.27 and 1.29 with A = 1 and bounds 0.8 … 1.28: the second is held. GRPO would hold both at 1.2.
    output, logprobs = loss_of("dapo", np.log([1.27, 1.29]), [1, 1], samples=np.array([0, 1]))
    np.testing.assert_allclose(output.per_token.detach(), [-1.27, -1.28])
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    np.testing.assert_allclose(gradient, [-1.27, 0])
    output, _ = loss_of("grpo", np.log([1.27, 1.29]), [1, 1], samples=np.array([0, 1]))
    np.testing.assert_allclose(output.per_token.detach(), [-1.2, -1.2])


def numpy_gspo(log_ratios: NDArray[np.float64], advantages: Any, low: float, high: float) -> float:
    """−J of arXiv 2507.18071, eq. 5 and 7: a mean over sequences, each with one ratio."""
    terms = []
    for sample, advantage in enumerate(advantages):
        s = np.exp(log_ratios[sample == SAMPLES].mean())
        terms.append(min(s * advantage, np.clip(s, 1 - low, 1 + high) * advantage))
    return -float(np.mean(terms))


@given(st.lists(st.floats(-0.3, 0.3), min_size=6, max_size=6), st.lists(st.sampled_from([-2.0, -0.5, 1.0, 3.0]), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_gspo_is_that_of_the_paper_in_value_and_gradient(log_ratios, advantages):
    log_ratios, bounds = np.array(log_ratios), {"clip_low": 0.05, "clip_high": 0.1}
    ratios = np.exp([log_ratios[sample == SAMPLES].mean() for sample in range(3)])
    near = np.abs(ratios[:, None] - np.array([0.95, 1.1])).min()
    total, gradient = update_loss("gspo", log_ratios, advantages, **bounds)
    assert total == pytest.approx(numpy_gspo(log_ratios, advantages, 0.05, 0.1), rel=1e-6, abs=1e-7)  # of float32, near 0 of terms near 1
    if near > 1e-5:  # a difference across the bound is no derivative
        numeric = differences(lambda at: numpy_gspo(at, advantages, 0.05, 0.1), log_ratios)
        np.testing.assert_allclose(gradient, numeric, atol=1e-7)


def test_gspo_worked_by_hand():
    # Sample 0: log-ratios 0.3 0 0, mean 0.1, s = 1.10517, above 1.0004: with A = 1 it is held, whole, though two of its ratios are 1.
    # Sample 1: 0.2 −0.2, mean 0, s = 1: no bound, though each ratio alone is far outside. Sample 2: −0.1, s = 0.904837, A = −1: held.
    output, logprobs = loss_of("gspo", [0.3, 0, 0, 0.2, -0.2, -0.1], [1, 2, -1])
    np.testing.assert_allclose(output.per_token.detach(), [-1.0004, -1.0004, -1.0004, -2, -2, 0.9997])
    np.testing.assert_allclose(output.metrics["ratio"], [1.1051709] * 3 + [1, 1, 0.9048374])
    assert output.metrics["clipped_high"].tolist() == [1, 1, 1, 0, 0, 0]
    assert output.metrics["clipped_low"].tolist() == [0, 0, 0, 0, 0, 1]
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    np.testing.assert_allclose(gradient, [0, 0, 0, -2, -2, 0], atol=1e-12)


def test_gspo_s_narrow_bounds_survive_float32():
    # 4e-4 beside 1 is 3,355 units of the last place: half of it is inside, twice as much outside.
    old = torch.full((4,), -5.0)
    logprobs = old + torch.log1p(torch.tensor([2e-4, 2e-4, 8e-4, 8e-4]))
    of_N = torch.tensor([0, 0, 1, 1])
    inputs = LossInputs(logprobs.requires_grad_(), old, old, None, torch.ones(4), of_N, of_N)
    assert ALGORITHMS["gspo"].loss(inputs, options_of("gspo")).metrics["clipped_high"].tolist() == [0, 0, 1, 1]


def test_cispo_worked_by_hand():
    # Ratios 6, 0.1, 6 with A = 1, 1, −1 and an upper bound of 5: weights 5, 0.1, 5; log-probabilities −1 + ln 6, −2 + ln 0.1, −3 + ln 6.
    output, logprobs = loss_of("cispo", np.log([6, 0.1, 6]), [1, 1, -1], samples=np.array([0, 1, 2]))
    expected = [-5 * (-1 + np.log(6)), -0.1 * (-2 + np.log(0.1)), 5 * (-3 + np.log(6))]
    np.testing.assert_allclose(output.per_token.detach(), expected)
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    np.testing.assert_allclose(gradient, [-5, -0.1, 5])  # none is cut off; GRPO would have 0, −0.1, 6
    assert output.metrics["clipped_high"].tolist() == [1, 0, 1]
    assert output.metrics["clipped_low"].tolist() == [0, 0, 0]
    held, _ = loss_of("cispo", np.log([6, 0.1, 6]), [1, 1, -1], samples=np.array([0, 1, 2]), clip_low=0.2)
    assert held.metrics["clipped_low"].tolist() == [0, 1, 0]


@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_cispo_is_that_of_the_paper_in_value_and_gradient(log_ratios, advantages):
    """arXiv 2506.13585, eq. 4 and 5: over all tokens of the batch, with a weight that is no function of what is differentiated."""
    log_ratios, old = np.array(log_ratios), -np.arange(1.0, 7)
    weights = np.minimum(np.exp(log_ratios), 5)

    def objective(at: NDArray[np.float64]) -> float:
        return -float(np.sum(weights * np.array(advantages)[SAMPLES] * (old + at)) / 6)

    total, gradient = update_loss("cispo", log_ratios, advantages)
    assert total == pytest.approx(objective(log_ratios), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(gradient, differences(objective, log_ratios), atol=1e-7)


def test_rloo_is_reinforce_over_whole_sequences():
    # −A · ∇ log π(sequence), a sum over its tokens; over sequences and, as a mere scale, the limit of 4 tokens.
    _, gradient = update_loss("rloo", np.zeros(6), [1, -2, 0.5])
    np.testing.assert_allclose(gradient * LIMIT * 3, -np.array([1.0, 1, 1, -2, -2, 0.5]))
    # A ratio of 3 is weighed by 3 and held by nothing.
    output, logprobs = loss_of("rloo", np.log([3, 0.2]), [1, 1], samples=np.array([0, 1]))
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    np.testing.assert_allclose(gradient, [-3, -0.2])
    assert set(output.metrics) == {"ratio"}


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"])
@given(st.lists(st.floats(-0.6, 0.6), min_size=6, max_size=6), st.lists(st.sampled_from([-2.0, -0.5, 1.0, 3.0]), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_the_clipped_surrogate_by_finite_differences(name, log_ratios, advantages):
    options, log_ratios = options_of(name), np.array(log_ratios)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    each, weights = np.array(advantages)[SAMPLES], weights_of(options.aggregate)

    def objective(at: NDArray[np.float64]) -> float:
        ratios = np.exp(at)
        held = np.where(each > 0, np.minimum(ratios, high), np.maximum(ratios, low))  # the papers' clipping, by cases
        return -float(np.sum(weights * held * each))

    total, gradient = update_loss(name, log_ratios, advantages)
    assert total == pytest.approx(objective(log_ratios), rel=1e-9, abs=1e-12)
    if np.abs(np.exp(log_ratios)[:, None] - np.array([low, high])).min() > 1e-5:
        np.testing.assert_allclose(gradient, differences(objective, log_ratios), atol=1e-7)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_on_policy_every_one_is_the_policy_gradient(name: str):
    """With a ratio of 1 all losses have the gradient −A: they differ in advantages, weights, and in what they do off-policy."""
    output, logprobs = loss_of(name, np.zeros(6), [1, -2, 0.5])
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    np.testing.assert_allclose(gradient, -np.array([1, 1, 1, -2, -2, 0.5]))


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_every_policy_gradient_takes_corrections_and_a_kl_term(name: str):
    policy, old, behaviour, reference, ones = (torch.full((2,), v, dtype=torch.float64) for v in (-1.0, -1.0, -1.5, -1.2, 1.0))
    first = torch.tensor([0, 0])
    inputs = LossInputs(policy.requires_grad_(), old, behaviour, reference, ones, first, first)
    plain = ALGORITHMS[name].loss(inputs, options_of(name)).per_token
    correction = {"kind": "truncate", "level": "token", "upper": 1.25}
    output = ALGORITHMS[name].loss(inputs, options_of(name, corrections=[correction], kl_coefficient=0.5, kl_in="loss", kl_estimator="k1"))
    np.testing.assert_allclose(output.per_token.detach(), 1.25 * plain.detach() + 0.5 * 0.2)
    assert {"weight", "kl"} <= set(output.metrics)


@pytest.mark.parametrize("name", ["best_of_n", "sft"])
def test_what_is_imitated_is_alike(name: str):
    output, _ = loss_of(name, np.zeros(6), [1, 1, 1])
    assert output.per_token.tolist() == [1, 2, 3, 4, 5, 6]
    assert output.metrics == {}
