"""The rewards shipped with Verst, by the names that a run file has."""

from __future__ import annotations

from collections.abc import Mapping

from verst.rewards.judge import Judge
from verst.rewards.reward_model import RewardModel
from verst.rewards.shipped import ExactMatch, FromInfo, MathVerify, ReasoningGym, Regex

SHIPPED: Mapping[str, type] = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "math_verify": MathVerify,
    "reasoning_gym": ReasoningGym,
    "from_info": FromInfo,
    "judge": Judge,
    "reward_model": RewardModel,
}
