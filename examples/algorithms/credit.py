"""A reward that says which tokens earned it, and a loss that reads that (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from verst.algorithms.losses import LossInputs
from verst.fields import PerToken, Score
from verst.types import Trajectory


def reward(trajectory: Trajectory, fields: Mapping[str, Any]) -> Score:
    """The share of generated tokens that had not been generated before; `fresh` is 1 for each of them."""
    tokens = np.concatenate([one.tokens_T[one.loss_mask_T] for one in trajectory.sequences]).tolist()
    fresh = np.array([token not in tokens[:place] for place, token in enumerate(tokens)], np.float32)
    return Score(float(fresh.mean()), {"fresh": PerToken(fresh)})


def loss(inputs: LossInputs) -> torch.Tensor:
    """The ratio times the advantage, of which a repeated token has half."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    return -(0.5 + 0.5 * inputs.fields["fresh"]) * ratio * inputs.advantages
