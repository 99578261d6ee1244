"""Mismatch: how far trainer and engine disagree about the same tokens under the same weights. Measured in every step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from verst.algorithms.kl import kl_per_token
from verst.errors import InvariantViolation
from verst.observe.metrics import Tally

RATIO_BAND = (0.5, 2.0)


def tally_mismatch(tally: Tally, trainer_N: NDArray[np.floating], behaviour_N: NDArray[np.floating], *, name: str = "mismatch") -> None:
    """Adds the disagreement over loss tokens, Δ = trainer − behaviour log-probability, both at the sampling temperature.

    The caller picks the tokens, and the name that says which: those sampled at the trainer's present version measure the engine
    ("mismatch"); those of older versions measure staleness too. Merged over microbatches and ranks the tally stays exact.

    - `abs_mean`, `abs_max`: |Δ| in nats
    - `k1`, `k3`: estimates of KL(behaviour ‖ trainer) in nats a token, in that direction because the engine drew the tokens
    - `outside_band`: share of tokens whose probability ratio exp(Δ) lies outside [0.5, 2]

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
        tally.mean(f"{name}/abs_mean", np.abs(delta).sum(), count)
        tally.peak(f"{name}/abs_max", np.abs(delta).max())
        tally.mean(f"{name}/k1", kl_per_token(behaviour, trainer, "k1").sum(), count)
        tally.mean(f"{name}/k3", kl_per_token(behaviour, trainer, "k3").sum(), count)
    inside = (delta >= low) & (delta <= high)  # NaN counts as outside
    tally.mean(f"{name}/outside_band", count - int(inside.sum()), count)


def mismatch_tokens(tally: Tally, *, name: str = "mismatch") -> int:
    """Tokens that `tally_mismatch` has seen under this name, over everything merged."""
    return int(tally.weights.get(f"{name}/abs_mean", 0))
