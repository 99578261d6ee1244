"""Mismatch: how far trainer and engine disagree about the same tokens. Measured in every step; `docs/fidelity.md` has the formulas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from verst.algorithms.kl import kl_per_token
from verst.errors import InvariantViolation
from verst.observe.metrics import Tally
from verst.types import NO_VERSION

RATIO_BAND = (0.5, 2.0)
LAST_AGE = 3
"""Older tokens are one class."""
_LARGEST_LOG_WEIGHT = 300.0
"""Of a sequence's weight, so that its square is finite in float64; beyond, one such weight holds everything anyway."""


def tally_fidelity(
    tally: Tally,
    trainer_N: NDArray[np.floating],
    behaviour_N: NDArray[np.floating],
    *,
    versions_N: NDArray[np.integer],
    samples_N: NDArray[np.integer],
    version: int,
) -> None:
    """Everything measured about the loss tokens of a microbatch: by the age of their version, and by the sample they belong to.

    Flat over loss tokens, log-probabilities at the sampling temperature. The trainer's are of policy version `version`, so only tokens
    of that version, "mismatch", measure the engine alone; "stale_mismatch" is of all that are older, and "mismatch/age_1" to
    "mismatch/age_3" and "mismatch/older" are its parts. Tokens that nobody sampled (`NO_VERSION`) are not counted.
    """
    sampled_N = versions_N != NO_VERSION
    ages_N = version - versions_N
    groups = {"mismatch": ages_N == 0, "stale_mismatch": ages_N != 0, "mismatch/older": ages_N > LAST_AGE}
    groups |= {f"mismatch/age_{age}": ages_N == age for age in range(1, LAST_AGE + 1)}
    for name, of_age_N in groups.items():
        chosen_N = of_age_N & sampled_N
        tally_mismatch(tally, trainer_N[chosen_N], behaviour_N[chosen_N], name=name)
    tally_sequences(tally, trainer_N[sampled_N], behaviour_N[sampled_N], samples_N[sampled_N])


def tally_mismatch(tally: Tally, trainer_N: NDArray[np.floating], behaviour_N: NDArray[np.floating], *, name: str = "mismatch") -> None:
    """Adds the disagreement over loss tokens, Δ = trainer − behaviour log-probability, both at the sampling temperature.

    The caller picks the tokens, and the name that says which. Merged over microbatches and ranks the tally stays exact.

    - `abs_mean`, `abs_max`: |Δ| in nats
    - `k1`, `k3`: estimates of KL(behaviour ‖ trainer) in nats a token, in that direction because the engine drew the tokens
    - `chi2`: estimate of χ²(trainer ‖ behaviour) = E[(r − 1)²] over the tokens the engine drew, with the ratio r = exp(Δ)
    - `ess`: effective sample size of the ratios as a share of the tokens, (Σ r)² / (N · Σ r²) (Kong 1992; arXiv 1809.04129)
    - `outside_band`: share of tokens whose ratio lies outside [0.5, 2]

    The number of tokens is `mismatch_tokens`. Raises `InvariantViolation` if the shapes differ. Values that are not finite are kept.
    """
    if trainer_N.shape != behaviour_N.shape:
        raise InvariantViolation(f"{name}: {trainer_N.shape} trainer but {behaviour_N.shape} behaviour log-probabilities")
    count = trainer_N.size
    if not count:
        return
    trainer, behaviour = trainer_N.astype(np.float64), behaviour_N.astype(np.float64)
    low, high = np.log(RATIO_BAND)
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite log-probability must show in the metrics, not stop the measuring
        delta = trainer - behaviour
        excess = np.expm1(delta)
        tally.mean(f"{name}/abs_mean", np.abs(delta).sum(), count)
        tally.peak(f"{name}/abs_max", np.abs(delta).max())
        tally.mean(f"{name}/k1", kl_per_token(behaviour, trainer, "k1").sum(), count)
        tally.mean(f"{name}/k3", kl_per_token(behaviour, trainer, "k3").sum(), count)
        tally.mean(f"{name}/chi2", (excess * excess).sum(), count)
    _tally_weights(tally, f"{name}/ess", delta)
    inside = (delta >= low) & (delta <= high)  # NaN counts as outside
    tally.mean(f"{name}/outside_band", count - int(inside.sum()), count)


def tally_sequences(
    tally: Tally, trainer_N: NDArray[np.floating], behaviour_N: NDArray[np.floating], samples_N: NDArray[np.integer]
) -> None:
    """Adds the effective sample size of whole samples' weights, as a share of the samples: (Σ w)² / (S · Σ w²).

    `sequences/ess_product` is of the likelihood ratios w = exp(Σ Δ), the weights of an unbiased sequence-level correction;
    `sequences/ess_geometric` of their means a token, w = exp(mean Δ) (GSPO, arXiv 2507.18071). Flat over loss tokens; `samples_N` names
    the sample of each, and a sample must come whole, in one call. Its tokens may be of several versions, so with asynchronous training
    staleness is part of both.
    """
    if not trainer_N.size:
        return
    _, sample_N = np.unique(samples_N, return_inverse=True)
    with np.errstate(invalid="ignore"):
        delta_N = trainer_N.astype(np.float64) - behaviour_N.astype(np.float64)
        sums_S = np.bincount(sample_N, weights=delta_N).astype(np.float64)
    _tally_weights(tally, "sequences/ess_product", sums_S)
    _tally_weights(tally, "sequences/ess_geometric", sums_S / np.bincount(sample_N))


def _tally_weights(tally: Tally, name: str, log_weights: NDArray[np.float64]) -> None:
    weights = np.exp(np.clip(log_weights, -_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT))
    tally.effective(name, weights.size, weights.sum(), (weights * weights).sum())


def mismatch_tokens(tally: Tally, *, name: str = "mismatch") -> int:
    """Tokens that `tally_mismatch` has seen under this name, over everything merged."""
    return int(tally.weights.get(f"{name}/abs_mean", 0))
