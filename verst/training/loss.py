"""One microbatch's part of an update's loss, and what is told of it: the same for every backend."""

from __future__ import annotations

import math

import numpy as np
import torch

from verst.algorithms.table import Algorithm
from verst.observe.metrics import Tally
from verst.training.broken import broken_samples
from verst.training.microbatch import Microbatch
from verst.training.step import LoadedStep, PerSample
from verst.types import Estimates


def policy_loss(
    algorithm: Algorithm,
    step: LoadedStep,
    microbatch: Microbatch,
    outputs: tuple[torch.Tensor, torch.Tensor],
    weights: PerSample,
    advantages: Estimates,
    tally: Tally,
) -> tuple[torch.Tensor, bool, list[str]]:
    """The loss to go back from, whether it is finite, and which samples are not, if it or a mean beside it is not.

    `outputs` are log-probabilities and entropies [N] of the loss tokens.
    """
    logprobs_N, entropy_N = outputs
    inputs = step.inputs(microbatch, logprobs_N, advantages)
    output = algorithm.loss(inputs, step.config.algorithm)
    weights_N = torch.from_numpy(np.concatenate([weights[i] for i in microbatch.indices])).to(logprobs_N.device)
    loss = (weights_N * output.per_token).sum()
    means = {"entropy": entropy_N} | output.metrics | output.pair_metrics
    # One copy from the device for all of them.
    total, share, *sums = torch.stack([loss.detach(), weights_N.sum(), *(m.sum() for m in means.values())]).double().tolist()
    tally.mean("loss/total", total, share)
    for name, value in zip(means, sums, strict=True):
        tally.mean(f"policy/{name}", value, len(means[name]))
    if all(map(math.isfinite, (total, *sums))):
        return loss, True, []
    return loss, math.isfinite(total), broken_samples(step.batch.samples, microbatch, inputs, output.per_token)
