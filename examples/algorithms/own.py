"""Advantages and a loss of one's own: `algorithm: {name: grpo, advantages: own:advantages, loss: own:loss}`, started in this directory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from verst.algorithms.losses import LossInputs, LossOutput
from verst.types import Sample


def advantages(rewards_N: NDArray[np.float64], groups_N: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Rewards less the median of their group, which one lucky answer does not move."""
    medians = {group: np.median(rewards_N[groups_N == group]) for group in np.unique(groups_N)}
    return rewards_N - np.array([medians[group] for group in groups_N])


def loss(inputs: LossInputs) -> LossOutput:
    """The ratio times the advantage, bounded where the advantage is negative only."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    bounded = torch.where(inputs.advantages < 0, ratio.clamp(max=2.0), ratio)
    return LossOutput(-bounded * inputs.advantages, {"bounded": (bounded != ratio).float()})
