"""What one step works through on one rank: its plan, its microbatches, and the log-probabilities known before the first update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verst.algorithms.aggregate import token_weights
from verst.algorithms.fidelity import tally_fidelity
from verst.algorithms.losses import LossInputs
from verst.algorithms.table import algorithm_for
from verst.config.algorithms import PolicyGradientConfig, RatioConfig
from verst.config.schema import Config
from verst.data.packing import StepPlan, plan_samples
from verst.errors import InvariantViolation, ModelError
from verst.fields import Field, kinds_of
from verst.observe.metrics import Tally
from verst.training.fields import loss_fields
from verst.training.microbatch import Microbatch, collate, flat
from verst.types import Batch, Estimates

PerSample = dict[int, NDArray[np.float32]]
"""Values of the loss tokens of each sample, by its index in the batch."""


@dataclass(slots=True)
class StepScores:
    """See `verst.protocols.BatchScores`."""

    tally: Tally
    reference_kl: Mapping[int, float]
    values: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)


@dataclass
class LoadedStep:
    """One batch on one rank. `old` and `reference` hold log-probabilities of this rank's samples, where they were computed.

    `values` are the critic's before the step's first update, if there is one.
    """

    config: Config
    batch: Batch
    rank: int
    device: torch.device
    plan: StepPlan
    multiple: int = 1  # of which the tokens of a microbatch are one
    old: PerSample = field(default_factory=dict)
    reference: PerSample = field(default_factory=dict)
    values: PerSample = field(default_factory=dict)

    @cached_property
    def kinds(self) -> Mapping[str, type[Field]]:
        """Of the fields of the whole batch, which every rank sees."""
        return kinds_of(self.batch.samples)

    @cached_property
    def trajectories(self) -> NDArray[np.int64]:
        """[samples of the batch] the number of each one's trajectory."""
        return self.batch.trajectories

    @property
    def version(self) -> int:
        """Policy version at consumption: step n is made of version n − 1."""
        return self.batch.step - 1

    def microbatches(self, update: int) -> list[Microbatch]:
        return [collate(self.batch.samples, indices, self.device, self.multiple) for indices in self.plan.updates[update].ranks[self.rank]]

    def is_empty(self, update: int) -> bool:
        """Whether no rank has a loss token in this update."""
        return not any(self.batch.samples[i].loss_mask_T.any() for i in self.plan.updates[update].samples)

    def weights(self, update: int) -> PerSample:
        """Share of each loss token in the update's loss. Every rank sees the whole batch, so all know the same denominators."""
        indices = self.plan.updates[update].samples
        masks = [self.batch.samples[i].loss_mask_T for i in indices]
        own = (int(self.trajectories[i]) for i in indices)
        shares = token_weights(masks, own, self.config.algorithm.aggregate, self.config.max_generated_tokens)
        return {i: share_T[mask_T] for i, share_T, mask_T in zip(indices, shares, masks, strict=True)}

    def behaviour(self, microbatch: Microbatch) -> NDArray[np.float32]:
        samples = self.batch.samples
        return flat({i: samples[i].behaviour_logprobs_T[samples[i].loss_mask_T] for i in microbatch.indices}, microbatch)

    def require_fitting(self, what: str, estimates: Estimates) -> None:
        """Raises `InvariantViolation` unless there is one for each sample, or for each loss token of a sample."""
        samples = self.batch.samples
        if len(estimates) != len(samples):
            raise InvariantViolation(f"step {self.batch.step}: {len(estimates)} {what} for {len(samples)} samples")
        for sample, own in zip(samples, estimates, strict=True):
            if np.ndim(own) and np.size(own) != sample.loss_mask_T.sum():
                raise InvariantViolation(f"sample {sample.id}: {np.size(own)} {what} for {sample.loss_mask_T.sum()} loss tokens")

    def inputs(self, microbatch: Microbatch, logprobs_N: torch.Tensor, advantages: Estimates) -> LossInputs:
        """Everything a loss may look at, on the device."""

        def tensor(values_N: NDArray[np.float32]) -> torch.Tensor:
            return torch.from_numpy(values_N).to(logprobs_N.device)

        samples_N = microbatch.sample_of_token()
        counts = zip(microbatch.indices, microbatch.counts, strict=True)
        own = [np.broadcast_to(np.asarray(advantages[i], np.float32), count) for i, count in counts]
        behaviour_N, options = tensor(self.behaviour(microbatch)), self.config.algorithm
        if isinstance(options, RatioConfig) and options.old_logprobs == "behaviour":
            old_N = behaviour_N
        else:
            old_N = tensor(flat(self.old, microbatch)) if self.old else logprobs_N.detach()
        return LossInputs(
            logprobs=logprobs_N,
            old_logprobs=old_N,
            behaviour_logprobs=behaviour_N,
            reference_logprobs=tensor(flat(self.reference, microbatch)) if self.reference else None,
            advantages=tensor(np.concatenate(own)),
            samples=torch.from_numpy(samples_N).to(logprobs_N.device),
            trajectories=torch.from_numpy(self.trajectories[samples_N]).to(logprobs_N.device),
            fields=loss_fields(self.batch.samples, self.kinds, microbatch, logprobs_N.device),
        )

    def tally_fidelity(self, tally: Tally, microbatch: Microbatch, trainer_N: NDArray[np.float32]) -> None:
        """Trainer minus behaviour, by the age of each token's version; see `verst.algorithms.fidelity`."""
        samples = self.batch.samples
        tally_fidelity(
            tally,
            trainer_N,
            self.behaviour(microbatch),
            versions_N=np.concatenate([samples[i].versions_T[samples[i].loss_mask_T] for i in microbatch.indices]),
            samples_N=microbatch.sample_of_token(),
            version=self.version,
        )


def require_known_tokens(batch: Batch, known: int, path: str) -> None:
    """Raises `ModelError` for a token outside the vocabulary. On a GPU it would end the process, far from its cause."""
    for sample in batch.samples:
        if not 0 <= sample.tokens_T.min() <= sample.tokens_T.max() < known:
            raise ModelError(
                f"sample {sample.id}: token {int(sample.tokens_T.max())} is not among the model's {known}; "
                f"the tokenizer in {path} has more tokens than the model's embedding"
            )


def kl_estimator(config: Config) -> Any:
    """The estimator of the divergence to the reference, by name."""
    options = config.algorithm
    return options.kl_estimator if isinstance(options, PolicyGradientConfig) else "k1"


def plan_batch(
    config: Config, batch: Batch, rank: int, world: int, device: torch.device, *, packed: bool = False, multiple: int = 1
) -> LoadedStep:
    """Plans a batch. Every rank makes the same plan and keeps the whole batch, of which it computes its own microbatches."""
    whole = algorithm_for(config.algorithm).whole_groups
    plan = plan_samples(batch.samples, config.train, ranks=world, packed=packed, whole_groups=whole)
    return LoadedStep(config, batch, rank, device, plan, multiple)
