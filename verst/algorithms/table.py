"""The algorithms, in one table. An entry answers every question that loop and backend ask; neither ever asks for a name.

An entry is composed of what the modules beside this one have: a way from rewards to advantages, a loss, and which samples are trained.
Its defaults are its section of the run file (`verst.config.algorithms`); `docs/algorithms.md` has formulas and papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verst.algorithms.advantages import (
    batch_normalised,
    group_advantages,
    leave_one_out_advantages,
    penalised_rewards,
    preference_signs,
    shortened_rewards,
)
from verst.algorithms.critic import Signal, Values, estimated
from verst.algorithms.losses import (
    LossInputs,
    LossOutput,
    cispo_loss,
    distill_loss,
    dpo_loss,
    grpo_loss,
    gspo_loss,
    likelihood_loss,
    reinforce_loss,
)
from verst.algorithms.selection import all_equal, best, best_and_worst

if TYPE_CHECKING:
    from verst.config.algorithms import (
        AlgorithmConfig,
        BestOfNConfig,
        ComparingConfig,
        GroupRelativeConfig,
        PolicyGradientConfig,
        RatioConfig,
        ReinforcePlusPlusConfig,
    )
    from verst.config.schema import Config

Advantages = Callable[[ArrayLike, NDArray[np.integer], Any], NDArray[np.float64]]
Loss = Callable[[LossInputs, Any], LossOutput]
TokenAdvantages = Callable[[ArrayLike, Sequence[Values], Any], Signal]
WithoutSignal = Callable[[Sequence[float], Any], str | None]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm. `options` is its own section of the run file (`GrpoConfig`, `SftConfig` …)."""

    name: str
    learns_from: Literal["policy", "demonstrations"]
    """Whether its samples are rolled out by the policy, or answers that the data has."""
    min_members: int
    """Trajectories of a group that must be trainable: below that there is no baseline, and the group is dropped."""
    without_signal: WithoutSignal
    """(rewards of a group's trainable trajectories, options) → why it has no gradient, so that it is dropped and replaced; None: it has."""
    trained: Callable[[Sequence[float]], Sequence[int]]
    """(rewards of a group's trainable trajectories) → the indices, ascending, of those that are trained."""
    whole_groups: bool
    """Whether the loss of a sample depends on the others of its group, so that one microbatch must have all of them."""
    loss: Loss
    shape_rewards: Callable[[ArrayLike, Mapping[int, float], ArrayLike, Any], NDArray[np.float64]]
    """(rewards [N], KL sum by index, loss tokens over the most there can be [N], options) → the rewards [N] of the advantages.

    All N are of the trajectories of a batch, each with its branches.
    """
    advantages: Advantages
    """(rewards [N], group numbers [N], options) → advantages [N] of trajectories; with a critic, what the last token of each has earned."""
    token_advantages: TokenAdvantages | None
    """(what the last token of each sample has earned [N], the critic's values of each sample's loss tokens, options) → what policy and
    critic are trained with. None: there is no critic, and all tokens of a sample share its advantage."""
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


# ---- which groups and samples are trained


def _every_group(rewards: Sequence[float], options: Any) -> None:
    del rewards, options


def _equal_rewards(rewards: Sequence[float], options: ComparingConfig) -> str | None:
    return f"all its rewards are equal ({rewards[0]})" if options.dynamic_sampling and all_equal(rewards) else None


def _no_pair(rewards: Sequence[float], options: Any) -> str | None:
    del options
    return f"all its rewards are equal ({rewards[0]}), so no two make a pair" if all_equal(rewards) else None


def _nothing_good(rewards: Sequence[float], options: BestOfNConfig) -> str | None:
    return None if max(rewards) > options.reward_above else f"its best reward ({max(rewards)}) is not above {options.reward_above}"


def _all(rewards: Sequence[float]) -> Sequence[int]:
    return range(len(rewards))


# ---- rewards and advantages


def _shaped_rewards(
    rewards_N: ArrayLike, reference_kl: Mapping[int, float], filled_N: ArrayLike, options: PolicyGradientConfig
) -> NDArray[np.float64]:
    coefficient = options.kl_coefficient if options.kl_in == "reward" else 0.0
    rewards = penalised_rewards(rewards_N, reference_kl if coefficient else {}, coefficient)
    return shortened_rewards(rewards, filled_N, options.overlong_share)


def _given_rewards(rewards_N: ArrayLike, reference_kl: Mapping[int, float], filled_N: ArrayLike, options: Any) -> NDArray[np.float64]:
    del reference_kl, filled_N, options
    return np.asarray(rewards_N, dtype=np.float64)


def _of_the_group(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: GroupRelativeConfig) -> NDArray[np.float64]:
    return group_advantages(rewards_N, groups_N, normalize_std=options.normalize_std)


def _of_the_others(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    del options
    return leave_one_out_advantages(rewards_N, groups_N)


def _of_the_batch(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: ReinforcePlusPlusConfig) -> NDArray[np.float64]:
    del groups_N, options
    return batch_normalised(rewards_N)


def _of_group_and_batch(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    del options
    return batch_normalised(group_advantages(rewards_N, groups_N, normalize_std=False))


def _earned_in_the_end(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    del groups_N, options
    return np.asarray(rewards_N, dtype=np.float64)


def _of_the_pair(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    del options
    return preference_signs(rewards_N, groups_N)


def _all_alike(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    del groups_N, options
    return np.ones(np.shape(rewards_N), dtype=np.float64)


def _of_the_tokens(rewards_N: ArrayLike, groups_N: NDArray[np.integer], options: Any) -> NDArray[np.float64]:
    """Of samples there are none: the loss has one for each token."""
    del groups_N, options
    return np.zeros(np.shape(rewards_N), dtype=np.float64)


# ---- what is computed before the first update


def _with_kl(options: PolicyGradientConfig) -> bool:
    return options.kl_coefficient > 0


def _for_the_ratio(options: PolicyGradientConfig, num_updates: int) -> bool:
    # With one update the policy is still the old one while its gradient is computed: the ratio is 1 and needs no second pass.
    # A KL term in the reward is part of the advantages, so it must be known before any gradient is.
    kl_in_reward = options.kl_coefficient > 0 and options.kl_in == "reward"
    return options.old_logprobs == "trainer" and (num_updates > 1 or kl_in_reward)


def _always(*options: Any) -> bool:
    del options
    return True


def _after_the_first(options: RatioConfig, num_updates: int) -> bool:
    return options.old_logprobs == "trainer" and num_updates > 1


def _never(*options: Any) -> bool:
    del options
    return False


def _policy_gradient(
    name: str, loss: Loss, advantages: Advantages, *, compares: bool = True, token_advantages: TokenAdvantages | None = None
) -> Algorithm:
    """Raises the probability of samples by their advantage. `compares`: with the others of the group."""
    return Algorithm(
        name=name,
        learns_from="policy",
        min_members=2 if compares else 1,
        without_signal=_equal_rewards if compares else _every_group,
        trained=_all,
        whole_groups=False,
        loss=loss,
        shape_rewards=_shaped_rewards,
        advantages=advantages,
        token_advantages=token_advantages,
        needs_reference=_with_kl,
        needs_old_logprobs=_for_the_ratio,
    )


def _imitation(
    name: str,
    learns_from: Literal["policy", "demonstrations"],
    without_signal: WithoutSignal,
    trained: Callable[[Sequence[float]], Sequence[int]],
) -> Algorithm:
    """Raises the likelihood of what it trains, all alike."""
    return Algorithm(
        name=name,
        learns_from=learns_from,
        min_members=1,
        without_signal=without_signal,
        trained=trained,
        whole_groups=False,
        loss=likelihood_loss,
        shape_rewards=_given_rewards,
        advantages=_all_alike,
        token_advantages=None,
        needs_reference=_never,
        needs_old_logprobs=_never,
    )


def _preference(name: str, learns_from: Literal["policy", "demonstrations"]) -> Algorithm:
    """Raises the likelihood of the better of two answers over that of the worse one, as measured against the initial model."""
    return Algorithm(
        name=name,
        learns_from=learns_from,
        min_members=2,
        without_signal=_no_pair,
        trained=best_and_worst,
        whole_groups=True,
        loss=dpo_loss,
        shape_rewards=_given_rewards,
        advantages=_of_the_pair,
        token_advantages=None,
        needs_reference=_always,
        needs_old_logprobs=_never,
    )


ALGORITHMS: Mapping[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        _policy_gradient("grpo", grpo_loss, _of_the_group),
        _policy_gradient("dr_grpo", grpo_loss, _of_the_group),
        _policy_gradient("dapo", grpo_loss, _of_the_group),
        _policy_gradient("gspo", gspo_loss, _of_the_group),
        _policy_gradient("cispo", cispo_loss, _of_the_group),
        _policy_gradient("rloo", reinforce_loss, _of_the_others),
        _policy_gradient("reinforce_plus_plus", grpo_loss, _of_the_batch, compares=False),
        _policy_gradient("reinforce_plus_plus_baseline", grpo_loss, _of_group_and_batch),
        _policy_gradient("ppo", grpo_loss, _earned_in_the_end, compares=False, token_advantages=estimated),
        Algorithm(
            name="distill",
            learns_from="policy",
            min_members=1,
            without_signal=_every_group,
            trained=_all,
            whole_groups=False,
            loss=distill_loss,
            shape_rewards=_given_rewards,
            advantages=_of_the_tokens,
            token_advantages=None,
            needs_reference=_never,
            needs_old_logprobs=_after_the_first,
        ),
        _imitation("best_of_n", "policy", _nothing_good, best),
        _preference("online_dpo", "policy"),
        _preference("dpo", "demonstrations"),
        _imitation("sft", "demonstrations", _every_group, _all),
    )
}
