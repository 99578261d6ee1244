"""Losses per token. No denominators here: how tokens are averaged is decided once, for the whole update, in `aggregate`.

Only tensor methods are used, so this module needs no torch to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verst.algorithms.corrections import correct, ratios
from verst.algorithms.kl import kl_per_token
from verst.errors import InvariantViolation

if TYPE_CHECKING:
    import torch

    from verst.config.algorithms import ClippedConfig, DistillConfig, PolicyGradientConfig, PreferenceConfig, RatioConfig
    from verst.config.values import Section


TEACHER = "teacher_logprobs"
"""The `PerToken` field in which the teacher's log-probabilities travel."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss may look at: flat tensors over the loss tokens of one microbatch. float32 unless said; only `logprobs` has a gradient."""

    logprobs: torch.Tensor
    """[N] of the policy being trained, at the sampling temperature."""
    old_logprobs: torch.Tensor
    """[N] that ratios are to: of the trainer at the start of the step, or with `old_logprobs: behaviour` as sampled.

    `logprobs.detach()` where neither is needed: in a step's only update, and of an algorithm without a ratio.
    """
    behaviour_logprobs: torch.Tensor
    """[N] as sampled, by the engine."""
    reference_logprobs: torch.Tensor | None
    """[N] of the reference model; None unless `Algorithm.needs_reference`."""
    advantages: torch.Tensor
    """[N] each token has its sample's, or with a critic its own."""
    samples: torch.Tensor
    """[N] int64, index in the batch of each token's sample. A microbatch has all loss tokens of its samples."""
    trajectories: torch.Tensor
    """[N] int64, number in the batch of each token's trajectory: several samples have the same if an agent's conversation branched.

    A microbatch may lack other samples of its trajectories.
    """
    fields: Mapping[str, Any] = field(default_factory=dict)
    """By name, what environment and reward have given (`verst.fields`), of each field that any sample of the batch has.

    `PerToken` and `PerSample`: [N] float32, NaN for tokens of a sample without it. `Opaque`: a list of the batch's samples, to be indexed
    with `samples`; None for one without it.
    """


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`per_token` [N] is to be weighted, summed and differentiated; each metric is [N] without gradient, to be averaged over tokens."""

    per_token: torch.Tensor
    metrics: dict[str, torch.Tensor]
    pair_metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """[P] without gradient, one value for each pair of samples, to be averaged over them."""


def grpo_loss(inputs: LossInputs, options: ClippedConfig) -> LossOutput:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), bounds apart (DAPO, arXiv 2503.14476, eq. 8), of all but GSPO, CISPO and RLOO.

    With ratio r = exp(logprob − old logprob): −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A). Metrics: `ratio`; `clipped_low` and
    `clipped_high`, 1 where that bound has switched the token's gradient off. A ratio beyond float32 (log-ratio above 88) gives a
    non-finite gradient, which the update reports and skips. What `corrections` and the KL term add stands in `completed`.
    """
    return _clipped(inputs, options, (inputs.logprobs - inputs.old_logprobs).exp())


def gspo_loss(inputs: LossInputs, options: ClippedConfig) -> LossOutput:
    """The clipped surrogate with one ratio for each sequence: GSPO, arXiv 2507.18071, eq. 5 to 7.

    s = exp(mean of logprob − old logprob over the sample): of a trajectory with branches each sequence has its own. Each token has s as
    the value of its ratio, and the gradient of its own log-probability: GSPO-token, eq. 13 and 14. With one advantage for the sample, as
    here, value and gradient are GSPO's (§4.3), whatever the samples' tokens weigh. Metrics as of `grpo_loss`; where a bound acts, it acts
    on all tokens of the sample.
    """
    sequence_N = ratios(inputs.logprobs, inputs.old_logprobs, inputs.samples, "geometric").to(inputs.logprobs.dtype)
    return _clipped(inputs, options, sequence_N * (inputs.logprobs - inputs.logprobs.detach()).exp())


def cispo_loss(inputs: LossInputs, options: ClippedConfig) -> LossOutput:
    """REINFORCE with a clipped importance weight, which is a constant to the gradient: CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.

    −clip(r, 1 − clip_low, 1 + clip_high)·A·logprob. No token's gradient is ever switched off. Metrics: `ratio`; `clipped_low` and
    `clipped_high`, 1 where that bound is the weight.
    """
    ratio = (inputs.logprobs.detach() - inputs.old_logprobs).exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    per_token = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
    bounds = {"clipped_low": (ratio < low).to(ratio.dtype), "clipped_high": (ratio > high).to(ratio.dtype)}
    return completed(inputs, options, per_token, {"ratio": ratio} | bounds)


def reinforce_loss(inputs: LossInputs, options: PolicyGradientConfig) -> LossOutput:
    """The policy gradient without bounds: RLOO, arXiv 2402.14740, its REINFORCE estimator.

    −r·A. In a step's only update r is 1 and the gradient −A·∇logprob; in later ones, and with `old_logprobs: behaviour`, the ratio
    makes it that of the policy that sampled, token by token. Metric: `ratio`.
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    return completed(inputs, options, -ratio * inputs.advantages, {"ratio": ratio.detach()})


def dpo_loss(inputs: LossInputs, options: PreferenceConfig) -> LossOutput:
    """Direct Preference Optimization, arXiv 2305.18290, eq. 7: −log σ(r(chosen) − r(rejected)), in nats, on each token of the pair.

    r = beta · Σ (logprob − reference logprob) over a trajectory, with all of its branches, is its implicit reward (eq. 5, without the term
    that a pair has in common). Trajectories 2k and 2k + 1 of the batch are a pair, of advantages 1 and −1; a microbatch has all samples of
    both, or none. Sums are in float64. With
    `sequence_mean` weights the tokens' losses sum to the mean over pairs. Metrics of pairs: `chosen_reward` and `rejected_reward`,
    `reward_margin` (their difference), and `reward_accuracy`, the share of pairs in which it is above 0.

    Raises `InvariantViolation` without reference log-probabilities, or if a pair is torn apart.
    """
    if inputs.reference_logprobs is None:
        raise InvariantViolation(f"{options.name}: the backend gave no reference log-probabilities")
    pairs, pair_N = (inputs.trajectories // 2).unique(return_inverse=True)
    rewards_N = options.beta * (inputs.logprobs - inputs.reference_logprobs).double()
    none_P = rewards_N.new_zeros(len(pairs))
    chosen_N = inputs.advantages > 0
    chosen_P = none_P.index_add(0, pair_N, rewards_N * chosen_N)
    rejected_P = none_P.index_add(0, pair_N, rewards_N * ~chosen_N)
    better_P, worse_P = (none_P.index_add(0, pair_N, side_N.double()) for side_N in (chosen_N, inputs.advantages < 0))
    if not bool(((better_P > 0) & (worse_P > 0)).all()):
        raise InvariantViolation(f"{options.name}: a microbatch has one sample of a pair without the other")
    margin_P = chosen_P - rejected_P
    loss_P = none_P.logaddexp(-margin_P)
    metrics = {"chosen_reward": chosen_P, "rejected_reward": rejected_P, "reward_margin": margin_P, "reward_accuracy": margin_P > 0}
    told = {name: values_P.detach().to(inputs.logprobs.dtype) for name, values_P in metrics.items()}
    return LossOutput(loss_P[pair_N].to(inputs.logprobs.dtype), {}, told)


def distill_loss(inputs: LossInputs, options: DistillConfig) -> LossOutput:
    """Reverse KL divergence to a teacher on the policy's own samples, token by token: GKD, arXiv 2306.13649, and MiniLLM, arXiv 2306.08543.

    −r·A with A = log-probability of the teacher − old log-probability. Where the policy samples a token, −A is an estimate of
    KL(policy, teacher) at its place, metric `teacher_kl`, and the gradient of the loss one of that divergence's. Each token answers for
    itself: as in GKD, that it leads to other tokens has no part (discount 0). As in `reinforce_loss`, r is 1 in a step's only update.
    Further metrics: `ratio`, and those of the corrections.
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    advantages = inputs.fields[TEACHER] - inputs.old_logprobs
    per_token, told = corrected(inputs, options, -ratio * advantages)
    return LossOutput(per_token, {"ratio": ratio.detach(), "teacher_kl": -advantages} | told)


def likelihood_loss(inputs: LossInputs, options: Section) -> LossOutput:
    """Negative log-likelihood of the tokens to imitate, in nats."""
    del options  # aggregation is not the loss's business
    return LossOutput(-inputs.logprobs, {})


def _clipped(inputs: LossInputs, options: ClippedConfig, ratio: torch.Tensor) -> LossOutput:
    advantages = inputs.advantages
    low, high = 1 - options.clip_low, 1 + options.clip_high
    per_token = -(ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    seen = ratio.detach()
    metrics = {
        "ratio": seen,
        "clipped_low": ((seen < low) & (advantages < 0)).to(seen.dtype),
        "clipped_high": ((seen > high) & (advantages > 0)).to(seen.dtype),
    }
    return completed(inputs, options, per_token, metrics)


def corrected(inputs: LossInputs, options: RatioConfig, per_token: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """w · loss, and metrics: the weight w is 1 without `corrections`, else theirs, of old over behaviour probabilities."""
    if not options.corrections:
        return per_token, {}
    weights, told = correct(inputs.old_logprobs, inputs.behaviour_logprobs, inputs.samples, options.corrections)
    return weights * per_token, told


def completed(inputs: LossInputs, options: PolicyGradientConfig, per_token: torch.Tensor, metrics: dict[str, torch.Tensor]) -> LossOutput:
    """w · loss + kl_coefficient · KL estimate, with the metrics of both: those of the corrections, and `kl` where there is a reference.

    The weight w is 1 without `corrections`, else theirs, of old over behaviour probabilities (`verst.algorithms.corrections`).
    The KL term is GRPO's (arXiv 2402.03300, eq. 4), and no correction weighs it.
    """
    per_token, told = corrected(inputs, options, per_token)
    metrics |= told
    if options.kl_coefficient > 0:
        if inputs.reference_logprobs is None:
            raise InvariantViolation(
                f"{options.name}: algorithm.kl_coefficient is above 0, but the backend gave no reference log-probabilities"
            )
        kl = kl_per_token(inputs.logprobs, inputs.reference_logprobs, options.kl_estimator)
        metrics["kl"] = kl.detach()
        if options.kl_in == "loss":
            per_token = per_token + options.kl_coefficient * kl
    return LossOutput(per_token, metrics)
