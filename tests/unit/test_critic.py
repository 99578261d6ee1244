"""What a critic adds, in NumPy and torch: GAE against its definition and by hand, returns, and the clipped value loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.algorithms.critic import estimated, explained_variance, generalized_advantages, value_loss
from verst.config.algorithms import PpoConfig
from verst.config.load import load_config
from verst.errors import InvariantViolation, TrainingDiverged
from verst.runtime.batching import describe, describe_values, signal
from verst.types import NO_VERSION, Batch, Sample


def test_gae_worked_by_hand():
    # γ = ½, λ = ½, so each step counts a quarter of the next. δ: 0 + ½·2 − 1 = 0; 0 + ½·4 − 2 = 0; 3 − 4 = −1.
    (found,) = generalized_advantages([np.array([0.0, 0, 3])], [np.array([1.0, 2, 4])], gamma=0.5, gae_lambda=0.5)
    assert found.tolist() == [-1 / 16, -1 / 4, -1]
    # λ = 1 and γ = 1: the reward that came in the end, less the value. λ = 0: δ alone.
    (whole,) = generalized_advantages([np.array([0.0, 0, 3])], [np.array([1.0, 2, 4])], gamma=1, gae_lambda=1)
    assert whole.tolist() == [2, 1, -1]
    (one,) = generalized_advantages([np.array([0.0, 0, 3])], [np.array([1.0, 2, 4])], gamma=1, gae_lambda=0)
    assert one.tolist() == [1, 2, -1]


def by_definition(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, term by term."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


NUMBER = st.floats(-5, 5, width=32)
STEPS = st.lists(st.tuples(NUMBER, NUMBER), max_size=12)


@given(st.lists(STEPS, max_size=5), st.floats(0.01, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_gae_is_its_definition_for_sequences_of_any_length(sequences: list[list[tuple[float, float]]], gamma: float, gae_lambda: float):
    rewards, values = ([[step[k] for step in steps] for steps in sequences] for k in (0, 1))
    found = generalized_advantages([np.array(r) for r in rewards], [np.array(v) for v in values], gamma=gamma, gae_lambda=gae_lambda)
    assert len(found) == len(sequences)
    for own, r, v in zip(found, rewards, values, strict=True):
        np.testing.assert_allclose(own, by_definition(r, v, gamma, gae_lambda), atol=1e-9)
    # the others make no difference to a sequence, in any bit
    for i, own in enumerate(found):
        (alone,) = generalized_advantages([np.array(rewards[i])], [np.array(values[i])], gamma=gamma, gae_lambda=gae_lambda)
        assert own.tolist() == alone.tolist()


def test_gae_wants_a_reward_and_a_value_for_each_step():
    with pytest.raises(InvariantViolation, match="sequence 1 has 1 rewards for 2 values"):
        generalized_advantages([np.zeros(2), np.zeros(1)], [np.zeros(2), np.zeros(2)], gamma=1, gae_lambda=1)


VALUES = [np.array([0.5, 1.0], np.float32), np.array([], np.float32), np.array([0.25], np.float32)]


def test_returns_are_those_of_advantages_that_were_not_normalised():
    plain = estimated([2.0, 7.0, 1.0], VALUES, PpoConfig(gae_lambda=1.0, normalize_advantages=False))
    assert [a.tolist() for a in plain.advantages] == [[1.5, 1.0], [], [0.75]]  # type: ignore[union-attr]
    assert [r.tolist() for r in plain.returns] == [[2.0, 2.0], [], [1.0]]  # γ = λ = 1: the reward
    normal = estimated([2.0, 7.0, 1.0], VALUES, PpoConfig(gae_lambda=1.0))
    assert [r.tolist() for r in normal.returns] == [r.tolist() for r in plain.returns]
    every = np.concatenate(list(normal.advantages))  # type: ignore[arg-type]
    expected = (np.array([1.5, 1.0, 0.75]) - 13 / 12) / np.std([1.5, 1.0, 0.75], ddof=1)
    np.testing.assert_allclose(every, expected, rtol=1e-5)
    assert every.dtype == np.float32


def test_explained_variance():
    returns = [np.array([1.0, 3.0], np.float32), np.array([5.0], np.float32)]
    assert explained_variance(returns, returns) == 1
    assert explained_variance([np.zeros(2, np.float32), np.zeros(1, np.float32)], returns) == 0
    half = [np.array([0.0, 1.0], np.float32), np.array([2.0], np.float32)]  # half the slope: ¼ of the variance is left
    assert explained_variance(half, returns) == pytest.approx(0.75)
    assert explained_variance(returns, [np.ones(2, np.float32), np.ones(1, np.float32)]) is None


def test_the_value_loss_worked_by_hand():
    # Old value 0, return 1, bound ½. Within the bound the plain square; beyond it towards the return, the square at the bound, without
    # gradient; beyond it away from the return, the plain square, which is larger.
    values = torch.tensor([0.25, 0.75, -0.75]).requires_grad_()
    per_token, metrics = value_loss(values, torch.zeros(3), torch.ones(3), 0.5)
    assert per_token.tolist() == [0.5 * 0.75**2, 0.5 * 0.5**2, 0.5 * 1.75**2]
    per_token.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-0.75, 0.0, -1.75]
    assert metrics["clipped"].tolist() == [0, 1, 0]
    plain, none = value_loss(values, torch.zeros(3), torch.ones(3), 0.0)
    assert plain.tolist() == [0.5 * 0.75**2, 0.5 * 0.25**2, 0.5 * 1.75**2]
    assert none == {}


# ---- from a batch to its signal


def sample(name: str, mask: list[int], reward: float) -> Sample:
    mask_T = np.array(mask, dtype=bool)
    count = len(mask)
    return Sample(name, 0, np.arange(count, dtype=np.int32), mask_T, np.zeros(count, np.float32), np.full(count, NO_VERSION), reward)


def config(**options: Any) -> Any:
    return load_config({"run": {"steps": 9}, "model": {"path": "m"}, "algorithm": {"name": "ppo", **options}})


def test_tokens_that_were_given_are_no_steps():
    """Two turns with a reply of two tokens between: the last token of the first turn is followed by the first of the second."""
    batch = Batch(1, (0,), (sample("turns", [0, 1, 1, 0, 0, 1], 3.0),))
    found = signal(batch, config(gae_lambda=0.0, normalize_advantages=False), {}, {0: np.array([1, 2, 4], np.float32)})
    assert [a.tolist() for a in found.advantages] == [[1.0, 2.0, -1.0]]  # type: ignore[union-attr]
    assert describe((), found.advantages, 0)["advantage/abs"] == pytest.approx(4 / 3)


def test_a_kl_term_and_the_overlong_punishment_are_part_of_the_last_reward():
    batch = Batch(1, (0,), (sample("one", [0, 1, 1], 3.0),))
    found = signal(
        batch, config(gae_lambda=1.0, normalize_advantages=False, kl_coefficient=0.5), {0: 2.0}, {0: np.array([0, 1], np.float32)}
    )
    assert [a.tolist() for a in found.advantages] == [[2.0, 1.0]]  # type: ignore[union-attr]
    assert [r.tolist() for r in found.returns] == [[2.0, 2.0]]


def test_each_loss_token_needs_a_value():
    batch = Batch(1, (0,), (sample("one", [0, 1, 1], 3.0), sample("empty", [0, 0, 0], 3.0)))
    assert [len(r) for r in signal(batch, config(), {}, {0: np.zeros(2, np.float32)}).returns] == [2, 0]
    with pytest.raises(InvariantViolation, match="sample one: 0 values of the critic for 2 loss tokens"):
        signal(batch, config(), {}, {})
    with pytest.raises(TrainingDiverged, match=r"sample one is not finite.*critic_lr"):
        signal(batch, config(), {}, {0: np.array([0, np.inf], np.float32)})


def test_what_is_told_of_values():
    told = describe_values({0: np.array([1.0, 2.0], np.float32)}, [np.array([2.0, 4.0], np.float32), np.zeros(0, np.float32)]).report()
    assert told == {"critic/value": 1.5, "critic/explained_variance": 0.75}
    assert describe_values({}, ()).report() == {}
