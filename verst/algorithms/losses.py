"""Losses per token. No denominators here: how tokens are averaged is decided once, for the whole update, in `aggregate`.

Only tensor methods are used, so this module needs no torch to be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from verst.algorithms.corrections import correct
from verst.algorithms.kl import kl_per_token
from verst.errors import InvariantViolation

if TYPE_CHECKING:
    import torch

    from verst.config.schema import GrpoConfig, SftConfig


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss may look at: flat tensors over the loss tokens of one microbatch. float32 unless said; only `logprobs` has a gradient."""

    logprobs: torch.Tensor
    """[N] of the policy being trained, at the sampling temperature."""
    old_logprobs: torch.Tensor
    """[N] of the trainer at the start of the step; `logprobs.detach()` where `Algorithm.needs_old_logprobs` is False."""
    behaviour_logprobs: torch.Tensor
    """[N] as sampled, by the engine."""
    reference_logprobs: torch.Tensor | None
    """[N] of the reference model; None unless `Algorithm.needs_reference`."""
    advantages: torch.Tensor
    """[N] each token has its sample's."""
    samples: torch.Tensor
    """[N] int64, index in the batch of each token's sample. A microbatch has all loss tokens of its samples."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`per_token` [N] is to be weighted, summed and differentiated; each metric is [N] without gradient, to be averaged over tokens."""

    per_token: torch.Tensor
    metrics: dict[str, torch.Tensor]


def grpo_loss(inputs: LossInputs, options: GrpoConfig) -> LossOutput:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), bounds apart (DAPO, arXiv 2503.14476), with GRPO's KL term (arXiv 2402.03300).

    With ratio r = exp(logprob − old logprob): −w · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) + kl_coefficient · KL estimate.
    The weight w is 1 without `corrections`, else theirs, of old over behaviour probabilities (`verst.algorithms.corrections`).
    Metrics: `ratio`; `clipped_low` and `clipped_high`, 1 where that bound has switched the token's gradient off; those of the
    corrections; `kl` where there is a reference. A ratio beyond float32 (log-ratio above 88) gives a non-finite gradient, which the
    update reports and skips.
    """
    old = inputs.behaviour_logprobs if options.old_logprobs == "behaviour" else inputs.old_logprobs
    advantages = inputs.advantages
    ratio = (inputs.logprobs - old).exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    per_token = -(ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    seen = ratio.detach()
    metrics = {
        "ratio": seen,
        "clipped_low": ((seen < low) & (advantages < 0)).to(seen.dtype),
        "clipped_high": ((seen > high) & (advantages > 0)).to(seen.dtype),
    }
    if options.corrections:
        weights, told = correct(inputs.old_logprobs, inputs.behaviour_logprobs, inputs.samples, options.corrections)
        per_token = weights * per_token
        metrics |= told
    if options.kl_coefficient > 0:
        if inputs.reference_logprobs is None:
            raise InvariantViolation("grpo: algorithm.kl_coefficient is above 0, but the backend gave no reference log-probabilities")
        kl = kl_per_token(inputs.logprobs, inputs.reference_logprobs, options.kl_estimator)
        metrics["kl"] = kl.detach()
        if options.kl_in == "loss":
            per_token = per_token + options.kl_coefficient * kl
    return LossOutput(per_token, metrics)


def sft_loss(inputs: LossInputs, options: SftConfig) -> LossOutput:
    """Negative log-likelihood of the demonstration's tokens, in nats."""
    del options  # aggregation, its one option, is not the loss's business
    return LossOutput(-inputs.logprobs, {})
