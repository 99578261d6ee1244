"""What a set of sampled answers says of a model: pass@k, means, and how sure they are. Plain numbers in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its confidence interval."""

    value: float
    low: float
    high: float
    prompts: int


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers is right, from `correct` right ones of n sampled: 1 − C(n − c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1). Raises `ValueError` unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them right: k must be 1 to the number of samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_shares(scored: Sequence[Sequence[float]], k: int, correct_from: float) -> list[float]:
    """pass@k of each prompt of which at least k samples could be scored. `scored`: the rewards of each prompt's samples."""
    return [pass_at_k(len(known), sum(r >= correct_from for r in known), k) for known in scored if len(known) >= k]


def share_interval(values: Sequence[float]) -> Estimate:
    """Mean of values in [0, 1], one for each prompt, with Wilson's score interval (Wilson 1927) for an effective number of prompts.

    Samples of one prompt are not independent, so prompts are what is counted. Their effective number is p (1 − p) / Var(mean), by which the
    interval follows the spread between prompts; with one sample a prompt it is the number of prompts, and this is Wilson's interval as it
    stands. Where all values are 0 or all are 1 it is the number of prompts too: the interval then keeps a width, as it should.
    """
    count = len(values)
    p = math.fsum(values) / count
    variance = math.fsum((value - p) ** 2 for value in values) / count / count
    effective = p * (1 - p) / variance if variance > 1e-18 and 0 < p < 1 else float(count)
    return Estimate(p, *wilson(p, effective), count)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for a share p of n trials."""
    square = _Z * _Z
    center = (p + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of one number for each prompt, ± z standard errors over prompts (Miller 2024, arXiv 2411.00640, clustered by prompt).

    The spread of a single prompt is unknown: its interval has no ends.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Estimate(mean, mean - _Z * error, mean + _Z * error, count)
