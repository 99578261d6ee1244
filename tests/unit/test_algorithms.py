"""Advantages, KL, losses, weights, mismatch and the table, against numbers worked by hand and an independent NumPy version."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.algorithms.advantages import group_advantages, penalised_rewards
from verst.algorithms.aggregate import token_weights
from verst.algorithms.fidelity import mismatch_tokens, tally_mismatch
from verst.algorithms.kl import Estimator, kl_per_sample, kl_per_token
from verst.algorithms.losses import TEACHER, LossInputs, distill_loss, grpo_loss, likelihood_loss
from verst.algorithms.table import ALGORITHMS, algorithm_for
from verst.config.algorithms import PRESETS, CorrectionConfig, DistillConfig, GrpoConfig, SftConfig
from verst.errors import InvariantViolation
from verst.observe.metrics import Tally, merged

SFT = SftConfig.model_validate({})
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def grpo(**options) -> GrpoConfig:
    return GrpoConfig.model_validate(options)


def float32(*values):
    return np.array(values, dtype=np.float32)


def test_the_package_needs_no_torch():
    modules = "advantages, aggregate, corrections, fidelity, kl, losses, selection, table"
    code = f"import sys; from verst.algorithms import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Advantages


def test_advantages_worked_by_hand():
    # Group 7: rewards 1 0 0 1, mean 1/2, sum of squares 1, sample deviation √(1/3): ±0.5·√3 = ±0.866025.
    # Group 3: rewards 2 5, mean 3.5, deviation √4.5 = 2.12132: ∓1.5 / 2.12132 = ∓0.707107. They interleave.
    rewards, groups = [1, 2, 0, 0, 5, 1], [7, 3, 7, 7, 3, 7]
    expected = [0.8660254, -0.7071068, -0.8660254, -0.8660254, 0.7071068, 0.8660254]
    np.testing.assert_allclose(group_advantages(rewards, groups, normalize_std=True), expected, rtol=3e-6)
    np.testing.assert_array_equal(group_advantages(rewards, groups, normalize_std=False), [0.5, -1.5, -0.5, -0.5, 1.5, 0.5])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_nothing_to_compare_is_exactly_zero(normalize_std):
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in float64: rounding must not become a gradient.
    advantages = group_advantages([0.1, 0.1, 0.1, 42.0], [0, 0, 0, 1], normalize_std=normalize_std)
    assert advantages.tolist() == [0.0, 0.0, 0.0, 0.0]


def numpy_advantages(rewards, groups, normalize_std):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(own) / len(own)
        deviation = (sum((r - mean) ** 2 for r in own) / max(len(own) - 1, 1)) ** 0.5
        out.append((reward - mean) / (deviation + 1e-6) if normalize_std else reward - mean)
    return out


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=30), st.booleans())
@settings(max_examples=50, deadline=None)
def test_advantages_of_any_grouping(pairs, normalize_std):
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    advantages = group_advantages(rewards, groups, normalize_std=normalize_std)
    np.testing.assert_allclose(advantages, numpy_advantages(rewards, groups, normalize_std), atol=1e-8, rtol=1e-9)
    for group in set(groups):
        assert advantages[np.array(groups) == group].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_named(reward):
    with pytest.raises(InvariantViolation, match=r"samples \[1\] are not finite"):
        group_advantages([0.0, reward], [0, 0], normalize_std=True)


def test_lengths_must_agree():
    with pytest.raises(InvariantViolation, match="group numbers"):
        group_advantages([0.0, 1.0], [0], normalize_std=True)


def test_penalised_rewards():
    # 1 − 0.1·2 = 0.8; sample 1 has no loss tokens, so no entry.
    rewards = np.array([1.0, 3.0, 0.0])
    np.testing.assert_allclose(penalised_rewards(rewards, {0: 2.0, 2: -1.0}, 0.1), [0.8, 3.0, 0.1])
    assert rewards.tolist() == [1.0, 3.0, 0.0]
    with pytest.raises(InvariantViolation, match="sample 3 is not in a batch of 3"):
        penalised_rewards(rewards, {3: 0.0}, 0.1)
    with pytest.raises(InvariantViolation, match="not finite"):
        penalised_rewards(rewards, {0: np.inf}, 0.1)


# KL


def test_kl_worked_by_hand():
    # Policy ½, reference ¼: δ = ln 2 = 0.693147. k2 = 0.240227; k3 = ½ − 1 + 0.693147 = 0.193147.
    policy, reference = np.log([0.5]), np.log([0.25])
    for estimator, expected in zip(ESTIMATORS, (0.69314718, 0.24022651, 0.19314718), strict=True):
        np.testing.assert_allclose(kl_per_token(policy, reference, estimator), [expected])
        tensor = kl_per_token(torch.tensor(policy), torch.tensor(reference), estimator)
        torch.testing.assert_close(tensor, torch.tensor([expected], dtype=torch.float64), rtol=1e-7, atol=1e-8)


def test_k1_and_k3_have_the_kl_as_their_mean_and_k2_its_gradient():
    # Exact expectations over a vocabulary of six, no sampling: Σ p·k.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    policy = torch.log_softmax(logits, 0)
    reference = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    weights = policy.exp().detach()
    kl = (policy.exp() * (policy - reference)).sum()
    reverse = (reference.exp() * (reference - policy)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((weights * kl_per_token(policy, reference, estimator)).sum(), kl)
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": gradient_of(kl, logits), "k3": gradient_of(reverse, logits)}
    for estimator in ESTIMATORS:
        loss = (weights * kl_per_token(policy, reference, estimator)).sum()
        torch.testing.assert_close(gradient_of(loss, logits), expected[estimator])


def gradient_of(value, leaf):
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def test_k3_is_never_negative_near_zero_in_float32():
    delta = torch.linspace(-1e-3, 1e-3, 2001)
    k3 = kl_per_token(delta, torch.zeros_like(delta), "k3")
    assert (k3 >= 0).all()
    torch.testing.assert_close(k3, delta.double().square().div(2).float(), rtol=1e-3, atol=1e-10)


def test_kl_per_sample():
    # k1, samples 4 and 9 interleaved: 4 gets 0.5 + 0.25, 9 gets −1.
    policy, reference = float32(-1, -2, -0.75), float32(-1.5, -1, -1)
    assert kl_per_sample(policy, reference, np.array([4, 9, 4]), "k1") == {4: 0.75, 9: -1.0}
    assert kl_per_sample(policy[:0], reference[:0], np.array([], dtype=np.int64), "k1") == {}


# Losses


def loss_inputs(logprobs, advantages, *, old=None, behaviour=None, reference=None):
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64)
    if not logprobs.requires_grad:
        logprobs = logprobs.clone().requires_grad_()
    old = logprobs.detach() if old is None else torch.as_tensor(old, dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        behaviour_logprobs=old if behaviour is None else torch.as_tensor(behaviour, dtype=torch.float64),
        reference_logprobs=None if reference is None else torch.as_tensor(reference, dtype=torch.float64),
        advantages=torch.as_tensor(advantages, dtype=torch.float64),
        samples=torch.zeros(len(logprobs), dtype=torch.int64),
        trajectories=torch.zeros(len(logprobs), dtype=torch.int64),
    )


def test_grpo_worked_by_hand():
    # Ratios 1.5, 0.5, 1.5, 0.5, 1.1 with advantages 2, 2, −2, −2, 1 and bounds 0.8 … 1.28:
    # min(3, 2.56) = 2.56 clipped high | min(1, 1.6) = 1 | min(−3, −2.56) = −3 | min(−1, −1.6) = −1.6 clipped low | 1.1
    old = np.log(0.3)
    ratios = np.array([1.5, 0.5, 1.5, 0.5, 1.1])
    inputs = loss_inputs(old + np.log(ratios), [2, 2, -2, -2, 1], old=np.full(5, old))
    output = grpo_loss(inputs, grpo(clip_low=0.2, clip_high=0.28))
    np.testing.assert_allclose(output.per_token.detach(), [-2.56, -1, 3, 1.6, -1.1])
    np.testing.assert_allclose(output.metrics["ratio"], ratios)
    assert output.metrics["clipped_high"].tolist() == [1, 0, 0, 0, 0]
    assert output.metrics["clipped_low"].tolist() == [0, 0, 0, 1, 0]
    assert set(output.metrics) == {"ratio", "clipped_low", "clipped_high"}
    # The gradient is −ratio · advantage, and 0 where clipped.
    np.testing.assert_allclose(gradient_of(output.per_token.sum(), inputs.logprobs), [0, -1, 3, 0, -1.1])


def distilled(teacher, **given):
    return replace(loss_inputs(given.pop("logprobs"), [0.0] * len(teacher), **given), fields={TEACHER: torch.tensor(teacher).double()})


def test_distillation_worked_by_hand():
    # Advantages teacher − old: −1 − (−2) = 1, −3 − (−2) = −1, −2 − (−2) = 0; ratios 1.5, 0.5, 2.
    old = [-2.0, -2.0, -2.0]
    inputs = distilled([-1.0, -3.0, -2.0], logprobs=-2 + np.log([1.5, 0.5, 2.0]), old=old, behaviour=[-2.5, -2.0, -2.0])
    output = distill_loss(inputs, DistillConfig(teacher="m"))
    np.testing.assert_allclose(output.per_token.detach(), [-1.5, 0.5, 0])
    np.testing.assert_allclose(gradient_of(output.per_token.sum(), inputs.logprobs), [-1.5, 0.5, 0])
    assert output.metrics["teacher_kl"].tolist() == [-1, 1, 0]
    np.testing.assert_allclose(output.metrics["ratio"], [1.5, 0.5, 2])
    # As sampled: the first token had −2.5, so its advantage is 1.5 and its ratio e^0.5 times as large.
    sampled = distill_loss(replace(inputs, old_logprobs=inputs.behaviour_logprobs), DistillConfig(teacher="m"))
    np.testing.assert_allclose(sampled.per_token.detach(), [-1.5 * 1.5 * np.exp(0.5), 0.5, 0])
    # A correction weighs the loss by old over behaviour probability, e^0.5 for the first token, up to 1.2.
    correction = CorrectionConfig(kind="truncate", level="token", upper=1.2)
    corrected = distill_loss(inputs, DistillConfig(teacher="m", corrections=[correction]))
    np.testing.assert_allclose(corrected.per_token.detach(), [-1.5 * 1.2, 0.5, 0])


def test_the_gradient_of_distillation_is_that_of_the_reverse_divergence():
    """In expectation over the policy's own samples: Σ p · (gradient of −r·A) is the gradient of KL(policy, teacher), by autograd."""
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5, 0.2], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    first = torch.zeros(4).long()
    inputs = LossInputs(logprobs, logprobs.detach(), logprobs.detach(), None, torch.zeros(4), first, first, {TEACHER: teacher})
    output = distill_loss(inputs, DistillConfig(teacher="m"))
    found = gradient_of((logprobs.detach().exp() * output.per_token).sum(), logits)
    again = torch.log_softmax(logits, 0)
    np.testing.assert_allclose(found, gradient_of((again.exp() * (again - teacher)).sum(), logits), atol=1e-12)
    estimated = (logprobs.detach().exp() * output.metrics["teacher_kl"]).sum().item()
    assert estimated == pytest.approx((again.exp() * (again - teacher)).sum().item())


def test_on_policy_gradient_is_minus_the_advantage():
    # The ratio is 1, where both branches of the minimum tie: neither half of the gradient may be lost.
    inputs = loss_inputs([-1.0, -2.0, -3.0], [1.5, -0.5, 0.0])
    output = grpo_loss(inputs, grpo())
    np.testing.assert_allclose(gradient_of(output.per_token.sum(), inputs.logprobs), [-1.5, 0.5, 0])


def numpy_grpo(logprobs, old, reference, advantages, options):
    """An independent version: by cases, as the papers describe the clipping in words."""
    out = []
    for logprob, old_logprob, ref, advantage in zip(logprobs, old, reference, advantages, strict=True):
        ratio = np.exp(logprob - old_logprob)
        bounded = min(ratio, 1 + options.clip_high) if advantage >= 0 else max(ratio, 1 - options.clip_low)
        delta = logprob - ref
        kl = {"k1": delta, "k2": delta**2 / 2, "k3": np.exp(ref - logprob) - (ref - logprob) - 1}[options.kl_estimator]
        out.append(-bounded * advantage + (options.kl_coefficient * kl if options.kl_in == "loss" else 0))
    return np.array(out)


@given(
    st.lists(st.tuples(*[st.floats(-6, 0)] * 3, st.floats(-3, 3)), min_size=1, max_size=20),
    st.builds(
        grpo,
        clip_low=st.floats(0.05, 1.0),
        clip_high=st.floats(0.05, 1.5),
        kl_coefficient=st.floats(0.01, 1),
        kl_in=st.sampled_from(["loss", "reward"]),
        kl_estimator=st.sampled_from(ESTIMATORS),
    ),
)
@settings(max_examples=50, deadline=None)
def test_grpo_against_an_independent_version(rows, options):
    logprobs, old, reference, advantages = (np.array(column) for column in zip(*rows, strict=True))
    inputs = loss_inputs(logprobs, advantages, old=old, reference=reference)
    output = grpo_loss(inputs, options)
    expected = numpy_grpo(logprobs, old, reference, advantages, options)
    np.testing.assert_allclose(output.per_token.detach(), expected, rtol=1e-9, atol=1e-9)
    assert all(metric.shape == (len(rows),) and not metric.requires_grad for metric in output.metrics.values())
    surrogate = inputs.advantages * output.metrics["ratio"]
    clipped = output.metrics["clipped_low"] + output.metrics["clipped_high"]
    if options.kl_in == "reward":  # no KL in the gradient then: what is clipped has none, all else −ratio · advantage
        gradient = gradient_of(output.per_token.sum(), inputs.logprobs)
        torch.testing.assert_close(gradient, -surrogate * (1 - clipped), rtol=1e-9, atol=1e-12)


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(InvariantViolation, match="kl_coefficient is above 0"):
        grpo_loss(loss_inputs([-1.0], [1.0]), grpo(kl_coefficient=0.1))


def test_sft_is_the_negative_log_likelihood():
    assert likelihood_loss(loss_inputs([-0.5, -2.0], [1, 1]), SFT).per_token.tolist() == [0.5, 2.0]


# Weights


def test_weights_worked_by_hand():
    masks = [np.array(m, dtype=bool) for m in ([0, 0, 1, 1, 1], [0, 1], [0, 0])]
    token = token_weights(masks, range(3), "token_mean", 8)  # four loss tokens in all
    assert [w.tolist() for w in token] == [[0, 0, 0.25, 0.25, 0.25], [0, 0.25], [0, 0]]
    sequence = token_weights(masks, range(3), "sequence_mean", 8)  # two sequences with loss tokens; the third does not count
    np.testing.assert_allclose(sequence[0], [0, 0, 1 / 6, 1 / 6, 1 / 6], rtol=1e-7)
    assert [w.tolist() for w in sequence[1:]] == [[0, 0.5], [0, 0]]
    constant = token_weights(masks, range(3), "constant", 8)  # two sequences, each of 8 tokens at most
    assert [w.tolist() for w in constant] == [[0, 0, 1 / 16, 1 / 16, 1 / 16], [0, 1 / 16], [0, 0]]
    assert all(w.dtype == np.float32 for w in token + sequence + constant)


def test_the_sequences_of_a_trajectory_weigh_as_one():
    """One of three loss tokens and a branch with a fourth, one of a single loss token, and one that has none, nor has its branch."""
    masks = [np.array(m, dtype=bool) for m in ([0, 1, 1, 1], [0, 0, 1], [0, 1], [0, 0], [0, 0])]
    owners = [0, 0, 1, 2, 2]
    token = token_weights(masks, owners, "token_mean", 8)  # five loss tokens in all
    np.testing.assert_allclose(np.concatenate(token), [0, 0.2, 0.2, 0.2, 0, 0, 0.2, 0, 0.2, 0, 0, 0, 0], rtol=1e-7)
    sequence = token_weights(masks, owners, "sequence_mean", 8)  # two trajectories, the first of four tokens
    assert [w.tolist() for w in sequence] == [[0, 1 / 8, 1 / 8, 1 / 8], [0, 0, 1 / 8], [0, 1 / 2], [0, 0], [0, 0]]
    constant = token_weights(masks, owners, "constant", 8)  # two trajectories, each of 8 tokens at most
    assert [w.tolist() for w in constant] == [[0, 1 / 16, 1 / 16, 1 / 16], [0, 0, 1 / 16], [0, 1 / 16], [0, 0], [0, 0]]


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant"])
def test_an_update_without_loss_tokens_weighs_nothing(mode):
    assert [w.tolist() for w in token_weights([np.zeros(3, dtype=bool), np.zeros(0, dtype=bool)], range(2), mode, 8)] == [[0, 0, 0], []]


def test_a_first_token_cannot_be_predicted():
    with pytest.raises(InvariantViolation, match="sequence 1 of the update has its first token"):
        token_weights([np.array([False, True]), np.array([True])], range(2), "token_mean", 8)


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=12), st.sampled_from(["token_mean", "sequence_mean"]))
@settings(max_examples=50, deadline=None)
def test_weights_sum_to_one(tails, mode):
    masks = [np.array([False, *tail]) for tail in tails]
    weights = token_weights(masks, range(len(masks)), mode, 12)
    assert all(((w > 0) == mask).all() for w, mask in zip(weights, masks, strict=True))
    assert sum(float(w.sum()) for w in weights) == pytest.approx(float(any(map(any, tails))), abs=1e-6)


# Mismatch


def test_mismatch_worked_by_hand():
    # Probabilities, trainer over behaviour: ½/¼ = 2 (inside, the band is closed), ¼/¼ = 1, 0.1/0.4 = ¼ (outside).
    trainer, behaviour = np.log([0.5, 0.25, 0.1]), np.log([0.25, 0.25, 0.4])
    tally = Tally()
    tally_mismatch(tally, trainer, behaviour)
    report = tally.report()
    assert report["mismatch/abs_mean"] == pytest.approx((np.log(2) + 0 + np.log(4)) / 3)
    assert report["mismatch/abs_max"] == pytest.approx(np.log(4))
    assert report["mismatch/k1"] == pytest.approx((-np.log(2) + np.log(4)) / 3)  # behaviour − trainer
    assert report["mismatch/k3"] == pytest.approx(((2 - 1 - np.log(2)) + 0 + (0.25 - 1 + np.log(4))) / 3)
    assert report["mismatch/outside_band"] == pytest.approx(1 / 3)
    assert mismatch_tokens(tally) == 3


def test_mismatch_estimates_the_kl_from_behaviour_to_trainer():
    # Exact expectation: each word as often as the behaviour policy draws it, in 1,000 tokens.
    behaviour, trainer = np.array([0.1, 0.3, 0.6]), np.array([0.2, 0.3, 0.5])
    words = np.repeat([0, 1, 2], [100, 300, 600])
    tally = Tally()
    tally_mismatch(tally, np.log(trainer)[words], np.log(behaviour)[words])
    expected = float((behaviour * np.log(behaviour / trainer)).sum())
    assert tally.report()["mismatch/k1"] == pytest.approx(expected)
    assert tally.report()["mismatch/k3"] == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=30), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_mismatch_does_not_depend_on_the_division(pairs, at):
    trainer, behaviour = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
    whole, parts = Tally(), (Tally(), Tally())
    tally_mismatch(whole, trainer, behaviour, name="drift")
    tally_mismatch(parts[0], trainer[:at], behaviour[:at], name="drift")
    tally_mismatch(parts[1], trainer[at:], behaviour[at:], name="drift")
    assert merged(parts).report() == pytest.approx(whole.report())
    assert mismatch_tokens(merged(parts), name="drift") == len(pairs)


def test_broken_log_probabilities_are_not_hidden():
    tally = Tally()
    tally_mismatch(tally, float32(-1, np.nan, -1e6), float32(-np.inf, -1, -1))
    report = tally.report()
    assert np.isnan(report["mismatch/abs_max"])
    assert np.isnan(report["mismatch/abs_mean"])
    assert report["mismatch/outside_band"] == 1
    with pytest.raises(InvariantViolation, match="mismatch"):
        tally_mismatch(tally, np.zeros(2), np.zeros(3))


# The table


def test_every_algorithm_of_the_schema_is_in_the_table():
    assert list(ALGORITHMS) == list(PRESETS)
    for name, preset in PRESETS.items():
        options: Any = preset(**({"teacher": "m"} if name == "distill" else {}))
        assert algorithm_for(options).name == ALGORITHMS[name].name == name


@pytest.mark.parametrize(
    ("options", "updates", "reference", "old"),
    [
        (grpo(), 1, False, False),  # the ratio is 1: no second pass
        (grpo(), 2, False, True),
        (grpo(old_logprobs="behaviour"), 4, False, False),
        (grpo(kl_coefficient=0.1), 1, True, False),
        (grpo(kl_coefficient=0.1, kl_in="reward"), 1, True, True),  # advantages need it before the first gradient
        (grpo(kl_coefficient=0.1, kl_in="reward", old_logprobs="behaviour"), 1, True, False),
        (SFT, 4, False, False),
    ],
)
def test_what_a_step_must_compute_first(options, updates, reference, old):
    algorithm = algorithm_for(options)
    assert algorithm.needs_reference(options) is reference
    assert algorithm.needs_old_logprobs(options, updates) is old


def test_rewards_and_advantages_by_the_table():
    groups = np.array([0, 0])
    algorithm, options = ALGORITHMS["grpo"], grpo(normalize_std=False, kl_coefficient=0.5, kl_in="reward")
    shaped = algorithm.shape_rewards([1.0, 0.0], {0: 1.0}, [1, 1], options)
    assert shaped.tolist() == [0.5, 0.0]
    assert algorithm.advantages(shaped, groups, options).tolist() == [0.25, -0.25]
    in_loss = grpo(kl_coefficient=0.5)  # the backend may report a KL; it then belongs to the loss alone
    assert algorithm.shape_rewards([1.0, 0.0], {0: 1.0}, [1, 1], in_loss).tolist() == [1.0, 0.0]
    sft = ALGORITHMS["sft"]
    assert (algorithm.learns_from, sft.learns_from) == ("policy", "demonstrations")
    assert sft.shape_rewards([0.0, 0.0], {}, [1, 1], SFT).tolist() == [0.0, 0.0]
    assert sft.advantages([0.0, 0.0], groups, SFT).tolist() == [1.0, 1.0]
