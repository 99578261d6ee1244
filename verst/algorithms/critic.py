"""What a critic adds: advantages of single tokens (GAE), what the critic is to predict, and its loss.

The states are the loss tokens of a sample, in order: a state's action is that token. Tokens that the policy did not choose (a further
prompt, an environment's reply) are no steps, so the state after a turn's last token is that of the next turn's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verst.algorithms.advantages import batch_normalised
from verst.errors import InvariantViolation
from verst.types import Estimates

if TYPE_CHECKING:
    import torch

    from verst.config.algorithms import PpoConfig

Values = NDArray[np.float32]
"""[N], one number for each loss token of a sample."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What the tokens of a batch are trained with, sample by sample."""

    advantages: Estimates
    returns: Sequence[Values] = ()
    """What the critic is to predict at each loss token; empty without one."""


def generalized_advantages(
    rewards: Sequence[NDArray[np.floating]], values: Sequence[NDArray[np.floating]], *, gamma: float, gae_lambda: float
) -> list[NDArray[np.float64]]:
    """[T] for each sequence: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t. GAE, arXiv 1506.02438, eq. 16.

    `rewards` and `values` [T] are of the steps of each sequence. The value after its last step is 0: every sequence has ended there.
    Raises `InvariantViolation` if a sequence has not one reward and one value for each step.
    """
    found = []
    for number, (rewards_T, values_T) in enumerate(zip(rewards, values, strict=True)):
        if len(rewards_T) != len(values_T):
            raise InvariantViolation(f"GAE: sequence {number} has {len(rewards_T)} rewards for {len(values_T)} values; each step has both")
        following_T = np.append(values_T, 0.0)[1:]
        deltas = (rewards_T + gamma * following_T - values_T).tolist()
        backward = accumulate(reversed(deltas), lambda later, delta: delta + gamma * gae_lambda * later)
        found.append(np.fromiter(backward, np.float64, len(deltas))[::-1])
    return found


def estimated(rewards_N: ArrayLike, values: Sequence[Values], options: PpoConfig) -> Signal:
    """Advantages and returns of every loss token. A sample's reward [N] is that of its last loss token, all others have 0.

    `values` are the critic's before the step's first update, one array for each sample. Returns are advantages plus values, before the
    advantages are normalised over all tokens of the batch (arXiv 2403.17031). Rewards and values are finite.
    """
    rewards = []
    for reward, values_T in zip(np.asarray(rewards_N, np.float64), values, strict=True):
        rewards_T = np.zeros(len(values_T))
        rewards_T[-1:] = reward
        rewards.append(rewards_T)
    advantages = generalized_advantages(rewards, values, gamma=options.gamma, gae_lambda=options.gae_lambda)
    returns = [(own + values_T).astype(np.float32) for own, values_T in zip(advantages, values, strict=True)]
    if options.normalize_advantages:
        ends = np.cumsum([len(own) for own in advantages])[:-1]
        advantages = np.split(batch_normalised(np.concatenate(advantages)), ends)
    return Signal([own.astype(np.float32) for own in advantages], returns)


def explained_variance(values: Sequence[Values], returns: Sequence[Values]) -> float | None:
    """1 − Var(returns − values) / Var(returns) over all tokens: 1 for a perfect critic, 0 for a constant, None if the returns are equal."""
    values_N, returns_N = (np.concatenate(parts).astype(np.float64) for parts in (values, returns))
    spread = returns_N.var() if len(returns_N) else 0.0
    return float(1 - (returns_N - values_N).var() / spread) if spread else None


def value_loss(
    values_N: torch.Tensor, old_N: torch.Tensor, returns_N: torch.Tensor, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """½ max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²) of each token, and `clipped`: 1 where that bound switched the gradient off.

    The value function's clipped loss of the PPO implementations that RLHF uses (arXiv 2403.17031). A clip of 0 is none.
    """
    square_N = (values_N - returns_N).square()
    if not clip:
        return square_N / 2, {}
    bounded_N = (old_N + (values_N - old_N).clamp(-clip, clip) - returns_N).square()
    clipped_N = (bounded_N > square_N).to(square_N.dtype)
    return square_N.maximum(bounded_N) / 2, {"clipped": clipped_N.detach()}
