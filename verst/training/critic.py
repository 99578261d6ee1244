"""A critic beside the policy of a trainer rank: a second model of the same backend, whose head gives one number, and its optimizer.

It works through the policy's microbatches, is divided among ranks like the policy, and is neither published nor exported. The value of a
loss token is that of the state before it: read where the policy predicts that token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from verst.algorithms.critic import value_loss
from verst.config.algorithms import PpoConfig
from verst.config.schema import Config, TrainConfig
from verst.observe.metrics import Tally
from verst.training.microbatch import Microbatch, flat
from verst.training.optimizer import ScheduledOptimizer
from verst.training.step import LoadedStep, PerSample

Optimizer = TypeVar("Optimizer", bound=ScheduledOptimizer)

CRITIC = "critic/"
"""Before the names of a critic's tensors."""
HEAD = "score.weight"
"""Hugging Face's name of the head, [1, hidden size]: that of sequence classification models."""


class Critic(ABC, Generic[Optimizer]):
    """One rank's. From two ranks on, the constructor and all methods that compute are collectives.

    The constructor of a critic makes `optimizer`, with `_train` and `_names`.
    """

    optimizer: Optimizer

    def __init__(self, config: Config, options: PpoConfig) -> None:
        self._options = options
        self._minibatches = config.train.minibatches
        self._path = options.critic_path or config.model.path
        self._where = f"model.path {self._path}" if options.critic_path is None else f"algorithm.critic_path {self._path}"
        self._train = self._trained_by(config.train)
        self._names = {"metrics": "critic", "rate": "train.lr" if options.critic_lr is None else "algorithm.critic_lr"}
        self._loss_is_finite = True
        self._broken: list[str] = []  # samples of this update

    def follow(self, train: TrainConfig) -> None:
        """See `ScheduledOptimizer.follow`. `train` is the policy's."""
        self.optimizer.follow(self._trained_by(train))

    def _trained_by(self, train: TrainConfig) -> TrainConfig:
        return train.model_copy(update={"lr": self._options.critic_lr or train.lr})

    @property
    def warmup_steps(self) -> int:
        """First steps of a run, which leave the policy as it is."""
        return self._options.critic_warmup_steps

    @property
    @abstractmethod
    def modules(self) -> Sequence[nn.Module]: ...

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """Of the decoder, those on this rank."""

    @abstractmethod
    def held(self) -> dict[str, torch.Tensor]:
        """What this rank trains, by names for a person that begin with `critic/`; see `verst.training.rest`."""

    @abstractmethod
    def score(self, step: LoadedStep) -> PerSample:
        """The value before each loss token of the samples whose loss this rank computes."""

    def accumulate(self, step: LoadedStep, update: int, returns: Sequence[NDArray[np.float32]]) -> Tally:
        """Forward and backward of one update's microbatches. `returns` [N] of each sample of the whole batch."""
        self.optimizer.zero_grad()
        self._loss_is_finite, self._broken = True, []
        tally = Tally()
        self._accumulate(step, update, returns, tally)
        return tally

    @abstractmethod
    def _accumulate(self, step: LoadedStep, update: int, returns: Sequence[NDArray[np.float32]], tally: Tally) -> None: ...

    def optimizer_step(self, name: str) -> Tally:
        """Clips and steps, or skips; see `ScheduledOptimizer.step`."""
        return self.optimizer.step(f"{name}, of the critic,", loss_is_finite=self._loss_is_finite, broken=self._broken)

    def _loss(
        self,
        step: LoadedStep,
        weights: PerSample,
        returns: Sequence[NDArray[np.float32]],
        tally: Tally,
        microbatch: Microbatch,
        values_N: torch.Tensor,
    ) -> torch.Tensor:
        """One microbatch's part of an update's loss, to go back from."""
        if not microbatch.loss_tokens:
            return values_N.sum() * 0.0

        def tensor(of_sample: PerSample) -> torch.Tensor:
            return torch.from_numpy(flat(of_sample, microbatch)).to(values_N.device)

        returns_N, weights_N = tensor({i: returns[i] for i in microbatch.indices}), tensor(weights)
        per_token_N, metrics = value_loss(values_N, tensor(step.values), returns_N, self._options.value_clip)
        loss = (weights_N * per_token_N).sum()
        total, share, *sums = torch.stack([loss.detach(), weights_N.sum(), *(m.sum() for m in metrics.values())]).double().tolist()
        tally.mean("critic/loss", total, share)
        for name, value in zip(metrics, sums, strict=True):
            tally.mean(f"critic/{name}", value, microbatch.loss_tokens)
        if not np.isfinite(total):
            self._loss_is_finite = False
            finite_N = torch.isfinite(per_token_N.detach()).cpu().numpy()
            broken = dict.fromkeys(microbatch.sample_of_token()[~finite_N].tolist())
            self._broken += [f"sample {step.batch.samples[i].id}: its value or its return is not finite" for i in broken]
        return loss
