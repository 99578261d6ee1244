"""From rewards to advantages. One float64 number for each sample of a batch; every token of a sample shares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    groups = np.asarray(groups_N)
    if rewards.shape != groups.shape:
        raise InvariantViolation(f"advantages: {rewards.shape} rewards for {groups.shape} group numbers; each sample needs one of both")
    advantages = np.zeros_like(rewards)
    for group in np.unique(groups):
        members = groups == group
        own = rewards[members]
        if own.min() == own.max():
            continue
        centred = own - own.mean()
        advantages[members] = centred / (own.std(ddof=1) + eps) if normalize_std else centred
    return advantages


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


def _finite(rewards_N: ArrayLike) -> NDArray[np.float64]:
    rewards = np.asarray(rewards_N, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(rewards))
    if broken.size:
        raise InvariantViolation(
            f"rewards of samples {broken[:8].tolist()} are not finite: one of them would spoil its whole group. "
            "Such a trajectory must be marked failed before it enters a batch"
        )
    return rewards
