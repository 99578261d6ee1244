"""Importance weights that correct for tokens drawn from another distribution than the trainer's. `docs/fidelity.md` has them in a table.

The ratio is r = trainer / behaviour probability. Both are fixed before the first update: the trainer's at the start of the step, the
engine's as sampled. The live policy never enters, because the clipped ratio of the loss, live / start of the step, is the other factor
(decoupled PPO, arXiv 2110.00641; AReaL, arXiv 2505.24298). Under equal weights r is the mismatch of engine and trainer; for tokens of an
older version it holds the staleness too.

A token's ratio is taken at one of three levels:

- token: r = exp(Δ), Δ = trainer − behaviour log-probability
- geometric: exp(mean of Δ over the sample), the same for all its tokens (GSPO, arXiv 2507.18071)
- sequence: exp(Σ Δ over the sample), the likelihood ratio of the whole, the same for all its tokens

`truncate` and `mask` weigh tokens by their ratio; `reject` only takes samples out. So at most one of the former makes sense, and any
number of the latter. A token of weight 0 still counts in the update's denominators, which are known before anything is computed
(`verst.algorithms.aggregate`; IcePop's objective divides alike): masking makes the step smaller and never gives others more weight.

Flat over the loss tokens of one microbatch, in which samples are whole. Only tensor methods, so no torch is needed to import this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from verst.config.algorithms import CorrectionConfig

Level = Literal["token", "geometric", "sequence"]


def ratios(trainer_N: torch.Tensor, behaviour_N: torch.Tensor, samples_N: torch.Tensor, level: Level) -> torch.Tensor:
    """[N] float64 without gradient: trainer over behaviour probability at `level`. `samples_N` names each token's sample."""
    delta_N = (trainer_N - behaviour_N).detach().double()
    if level == "token":
        return delta_N.exp()
    sums_N = _sample_sums(delta_N, samples_N)
    if level == "geometric":
        sums_N = sums_N / _sample_sums(delta_N.new_ones(delta_N.shape), samples_N)
    return sums_N.exp()


def truncate(ratios_N: torch.Tensor, upper: float) -> torch.Tensor:
    """Truncated importance sampling: min(r, upper). A bias for large ratios, against their variance.

    Ionides 2008 (J. Comput. Graph. Stat. 17, 295); between engine and trainer: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl
    """
    return ratios_N.clamp(max=upper)


def mask(ratios_N: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """Masked importance sampling: r where lower ≤ r ≤ upper, else 0. NaN is outside.

    At token level with both bounds it is IcePop (Ring-1T, arXiv 2510.18855, its function M); at sequence level with `upper` alone the MIS
    of Liu, Li et al. 2025, https://richardli.xyz/rl-collapse
    """
    return ratios_N.where(_inside(ratios_N, lower, upper), 0.0)


def reject(ratios_N: torch.Tensor, samples_N: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """Rejection of whole samples: 1 where all ratios of the token's sample are between the bounds, else 0. NaN is outside.

    At geometric level: Liu, Li et al. 2025, https://richardli.xyz/rl-collapse-3 (DeepSeek-V3.2, arXiv 2512.02556, masks sequences alike,
    but only those of negative advantage). At token level with `lower` alone: the veto of samples with a token that the trainer finds all
    but impossible, by the same authors.
    """
    outside_N = (~_inside(ratios_N, lower, upper)).double()
    return (_sample_sums(outside_N, samples_N) == 0).double()


def correct(
    trainer_N: torch.Tensor, behaviour_N: torch.Tensor, samples_N: torch.Tensor, corrections: Sequence[CorrectionConfig]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The product of all corrections [N], in the log-probabilities' dtype and without gradient, and its metrics [N].

    The factors are functions of the same ratios, so their order changes nothing. Metrics, to be averaged over tokens: `weight`;
    `truncated`, 1 where a ratio was above its bound; `masked`, 1 where nothing is left.
    """
    weights_N = trainer_N.detach().double().new_ones(trainer_N.shape)
    truncated_N = weights_N < 0
    for correction in corrections:
        ratios_N = ratios(trainer_N, behaviour_N, samples_N, correction.level)
        upper = float("inf") if correction.upper is None else correction.upper
        if correction.kind == "truncate":
            truncated_N = truncated_N | (ratios_N > upper)
            weights_N = weights_N * truncate(ratios_N, upper)
        elif correction.kind == "mask":
            weights_N = weights_N * mask(ratios_N, correction.lower, upper)
        else:
            weights_N = weights_N * reject(ratios_N, samples_N, correction.lower, upper)
    dtype = trainer_N.dtype
    metrics = {"weight": weights_N, "truncated": truncated_N, "masked": weights_N == 0}
    return weights_N.to(dtype), {name: values_N.to(dtype) for name, values_N in metrics.items()}


def _inside(ratios_N: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    return (ratios_N >= lower) & (ratios_N <= upper)


def _sample_sums(values_N: torch.Tensor, samples_N: torch.Tensor) -> torch.Tensor:
    """[N]: each token has the sum over its sample."""
    samples, sample_N = samples_N.unique(return_inverse=True)
    return values_N.new_zeros(len(samples)).index_add(0, sample_N, values_N)[sample_N]
