"""From rewards to advantages. One float64 number for each sample of a batch; every token of a sample shares it.

A trajectory with branches is one sample here: it has one reward, and weighs in baselines and deviations as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verst.errors import InvariantViolation


def group_advantages(
    rewards_N: ArrayLike, groups_N: Sequence[int] | NDArray[np.integer], *, normalize_std: bool, eps: float = 1e-6
) -> NDArray[np.float64]:
    """Reward minus the mean of its group; with `normalize_std` over the group's standard deviation plus `eps`.

    GRPO, arXiv 2402.03300 §4.1.2; without the division Dr. GRPO, arXiv 2503.20783. The deviation is the sample's (divisor n − 1),
    as in the published implementations, so that learning rates carry over. Groups may differ in size and lie in any order.
    A group of one, or of equal rewards, says nothing about which answer is better: its advantages are exactly 0, where
    rounding in the mean over a tiny deviation would leave noise.

    Raises `InvariantViolation` if the lengths differ or a reward is not finite.
    """
    rewards = _finite(rewards_N)
    advantages = np.zeros_like(rewards)
    for members in _groups(rewards, groups_N):
        own = rewards[members]
        centred = own - own.mean()
        advantages[members] = centred / (own.std(ddof=1) + eps) if normalize_std else centred
    return advantages


def leave_one_out_advantages(rewards_N: ArrayLike, groups_N: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float64]:
    """Reward minus the mean reward of the other samples of its group: RLOO, arXiv 2402.14740, its estimator RLOO(y₁ … y_k).

    It is n / (n − 1) times the reward less the mean of all n, and exactly 0 in a group of one or of equal rewards. Raises as
    `group_advantages` does.
    """
    rewards = _finite(rewards_N)
    advantages = np.zeros_like(rewards)
    for members in _groups(rewards, groups_N):
        own = rewards[members]
        advantages[members] = own - (own.sum() - own) / (len(own) - 1)
    return advantages


def preference_signs(rewards_N: ArrayLike, groups_N: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float64]:
    """1 for the better sample of each pair and -1 for the worse one; a group is a pair. Raises as `group_advantages` does."""
    return np.sign(group_advantages(rewards_N, groups_N, normalize_std=False))


def batch_normalised(values_N: ArrayLike, eps: float = 1e-6) -> NDArray[np.float64]:
    """Values less the mean of the whole batch, over its standard deviation plus `eps`; exactly 0 if all are equal.

    REINFORCE++, arXiv 2501.03262, its global advantage normalisation. Each sample counts once; implementations that normalise over tokens
    count long ones more often. The deviation has the divisor n − 1. Raises `InvariantViolation` if a value is not finite.
    """
    values = _finite(values_N)
    if not values.size or values.min() == values.max():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + eps)


def penalised_rewards(rewards_N: ArrayLike, reference_kl: Mapping[int, float], coefficient: float) -> NDArray[np.float64]:
    """Rewards less `coefficient` times each sample's KL to the reference (RLHF, arXiv 2203.02155, eq. 2, with one term a sequence).

    `reference_kl` maps a sample's index in the batch to its sum of KL estimates (`kl.kl_per_sample`), merged over all ranks. A sample
    that is missing has no loss tokens, so no divergence. Raises `InvariantViolation` if a value is not finite or an index unknown.
    """
    penalised = _finite(rewards_N).copy()
    for sample, kl in reference_kl.items():
        if not 0 <= sample < len(penalised):
            raise InvariantViolation(f"KL in the reward: sample {sample} is not in a batch of {len(penalised)} samples")
        penalised[sample] -= coefficient * kl
    return _finite(penalised)


def shortened_rewards(rewards_N: ArrayLike, filled_N: ArrayLike, share: float) -> NDArray[np.float64]:
    """Rewards less DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    `filled_N` [N] is the length of each sample as a share of the longest allowed, L_max. The punishment grows evenly from 0 at 1 − `share`
    to 1 at 1; the paper's cache of 4,096 of 20,480 tokens is a share of 0.2. A share of 0 changes nothing.
    Raises `InvariantViolation` if the lengths differ or a reward is not finite.
    """
    rewards, filled = _finite(rewards_N), np.asarray(filled_N, dtype=np.float64)
    if rewards.shape != filled.shape:
        raise InvariantViolation(f"overlong punishment: {rewards.shape} rewards for {filled.shape} lengths; each sample needs one of both")
    if not share:
        return rewards
    return rewards - np.clip((filled - (1 - share)) / share, 0.0, 1.0)


def _groups(rewards_N: NDArray[np.float64], groups_N: Sequence[int] | NDArray[np.integer]) -> Iterator[NDArray[np.bool_]]:
    """The members [N] of each group that has something to compare: not all of its rewards are equal."""
    groups = np.asarray(groups_N)
    if rewards_N.shape != groups.shape:
        raise InvariantViolation(f"advantages: {rewards_N.shape} rewards for {groups.shape} group numbers; each sample needs one of both")
    for group in np.unique(groups):
        members = groups == group
        if rewards_N[members].min() < rewards_N[members].max():
            yield members


def _finite(rewards_N: ArrayLike) -> NDArray[np.float64]:
    rewards = np.asarray(rewards_N, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(rewards))
    if broken.size:
        raise InvariantViolation(
            f"rewards of samples {broken[:8].tolist()} are not finite: one of them would spoil its whole group. "
            "Such a trajectory must be marked failed before it enters a batch"
        )
    return rewards
