"""The algorithms, in one table. An entry answers every question that loop and backend ask; neither ever asks for a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verst.algorithms.advantages import group_advantages, penalised_rewards
from verst.algorithms.losses import LossInputs, LossOutput, grpo_loss, sft_loss

if TYPE_CHECKING:
    from verst.config.schema import AlgorithmConfig, Config, GrpoConfig, SftConfig


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm. `options` is its own section of the run file (`GrpoConfig`, `SftConfig`)."""

    name: str
    learns_from: Literal["policy", "demonstrations"]
    """Whether its samples are rolled out by the policy or read from the data."""
    min_members: int
    """Trajectories of a group that must be trainable: below that there is no baseline, and the group is dropped."""
    needs_signal: Callable[[Any], bool]
    """(options) → whether a group whose rewards are all equal is dropped too, and replaced."""
    loss: Callable[[LossInputs, Any], LossOutput]
    shape_rewards: Callable[[ArrayLike, Mapping[int, float], Any], NDArray[np.float64]]
    """(rewards [N], KL sum by sample index, options) → the rewards [N] that advantages are computed from."""
    advantages: Callable[[ArrayLike, NDArray[np.integer], Any], NDArray[np.float64]]
    """(rewards [N], group number of each sample [N], options) → advantages [N]."""
    needs_reference: Callable[[Any], bool]
    """(options) → whether a frozen copy of the initial model must be kept and scored."""
    needs_old_logprobs: Callable[[Any, int], bool]
    """(options, updates in a step) → whether the trainer must score the batch before the step's first update."""


def algorithm_for(config: AlgorithmConfig) -> Algorithm:
    """The entry of the run file's `algorithm` section."""
    return ALGORITHMS[config.name]


def records_routes(config: Config) -> bool:
    """Whether engines record the expert routes of a model that has experts, and trainers read them. Demonstrations have none."""
    return config.train.routes != "ignore" and algorithm_for(config.algorithm).learns_from == "policy"


def _grpo_needs_signal(options: GrpoConfig) -> bool:
    return options.dynamic_sampling


def _grpo_rewards(rewards_N: ArrayLike, reference_kl: Mapping[int, float], options: GrpoConfig) -> NDArray[np.float64]:
    coefficient = options.kl_coefficient if options.kl_in == "reward" else 0.0
    return penalised_rewards(rewards_N, reference_kl if coefficient else {}, coefficient)


def _grpo_advantages(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: GrpoConfig) -> NDArray[np.float64]:
    return group_advantages(rewards_N, groups_N, normalize_std=options.normalize_std)


def _grpo_needs_reference(options: GrpoConfig) -> bool:
    return options.kl_coefficient > 0


def _grpo_needs_old_logprobs(options: GrpoConfig, num_updates: int) -> bool:
    # With one update the policy is still the old one while its gradient is computed: the ratio is 1 and needs no second pass.
    # A KL term in the reward is part of the advantages, so it must be known before any gradient is.
    kl_in_reward = options.kl_coefficient > 0 and options.kl_in == "reward"
    return options.old_logprobs == "trainer" and (num_updates > 1 or kl_in_reward)


def _sft_needs_signal(options: SftConfig) -> bool:
    del options
    return False


def _sft_rewards(rewards_N: ArrayLike, reference_kl: Mapping[int, float], options: SftConfig) -> NDArray[np.float64]:
    del reference_kl, options
    return np.asarray(rewards_N, dtype=np.float64)


def _sft_advantages(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: SftConfig) -> NDArray[np.float64]:
    del groups_N, options
    return np.ones(np.shape(rewards_N), dtype=np.float64)  # every demonstration is to be imitated, alike


def _sft_needs_reference(options: SftConfig) -> bool:
    del options
    return False


def _sft_needs_old_logprobs(options: SftConfig, num_updates: int) -> bool:
    del options, num_updates
    return False


ALGORITHMS: Mapping[str, Algorithm] = {
    "grpo": Algorithm(
        name="grpo",
        learns_from="policy",
        min_members=2,
        needs_signal=_grpo_needs_signal,
        loss=grpo_loss,
        shape_rewards=_grpo_rewards,
        advantages=_grpo_advantages,
        needs_reference=_grpo_needs_reference,
        needs_old_logprobs=_grpo_needs_old_logprobs,
    ),
    "sft": Algorithm(
        name="sft",
        learns_from="demonstrations",
        min_members=1,
        needs_signal=_sft_needs_signal,
        loss=sft_loss,
        shape_rewards=_sft_rewards,
        advantages=_sft_advantages,
        needs_reference=_sft_needs_reference,
        needs_old_logprobs=_sft_needs_old_logprobs,
    ),
}
