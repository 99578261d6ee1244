"""Estimators of KL(policy ‖ reference) from tokens drawn from the policy. Schulman 2020, http://joschu.net/blog/kl-approx.html

With δ = log policy − log reference of a sampled token, its contribution is

- k1: δ. Unbiased, high variance, negative for some tokens. As a loss its gradient has expectation 0: it regularises nothing.
- k2: δ²/2. Biased, never negative. As a loss its expected gradient is that of KL(policy ‖ reference).
- k3: exp(−δ) − 1 + δ. Unbiased, never negative. As a loss its expected gradient is that of KL(reference ‖ policy).

All of this holds for tokens drawn from the present policy; no importance weight corrects for tokens of an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Values = TypeVar("Values", "torch.Tensor", NDArray[np.float64])
Estimator = Literal["k1", "k2", "k3"]


def k1(delta: Values) -> Values:
    return delta


def k2(delta: Values) -> Values:
    return delta * delta / 2


def k3(delta: Values) -> Values:
    # expm1, because near δ = 0 what is left is δ²/2: exp(−δ) − 1 would lose it in rounding, and could make the sum negative.
    if isinstance(delta, np.ndarray):
        return np.expm1(-delta) + delta
    return (-delta).expm1() + delta


_ESTIMATORS: Mapping[str, Callable] = {"k1": k1, "k2": k2, "k3": k3}


def kl_per_token(policy: Values, reference: Values, estimator: Estimator) -> Values:
    """Contribution of each token to KL(policy ‖ reference), from log-probabilities of one shape, tensors or arrays."""
    return _ESTIMATORS[estimator](policy - reference)


def kl_per_sample(
    policy_N: NDArray[np.floating], reference_N: NDArray[np.floating], samples_N: NDArray[np.integer], estimator: Estimator
) -> dict[int, float]:
    """Sum of the KL estimate over the loss tokens of each sample: what a KL term in the reward subtracts.

    Flat over loss tokens; `samples_N` names the sample of each. A sample without loss tokens has no entry.
    """
    kl_N = kl_per_token(policy_N.astype(np.float64), reference_N.astype(np.float64), estimator)
    samples, index_N = np.unique(samples_N, return_inverse=True)
    sums = np.bincount(index_N, weights=kl_N, minlength=len(samples))
    return {int(sample): float(total) for sample, total in zip(samples, sums, strict=True)}
