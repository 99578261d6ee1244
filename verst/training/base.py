"""What every backend does alike: the frame of a step, the probe, and the memory that is given up between two steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from verst.algorithms.own import with_own_loss
from verst.algorithms.table import algorithm_for, records_routes
from verst.config.scheduled import config_at
from verst.config.schema import Config
from verst.errors import InvariantViolation
from verst.observe.metrics import Tally
from verst.observe.outliers import Progress
from verst.training.critic import Critic
from verst.training.distributed import local_part
from verst.training.optimizer import ScheduledOptimizer
from verst.training.pace import Pace
from verst.training.rest import AtRest, Held
from verst.training.step import LoadedStep, StepScores, require_known_tokens
from verst.types import Batch, Estimates, RoutedExperts, RoutesWanted
from verst.weights.offload import Offload

Optimizer = TypeVar("Optimizer", bound=ScheduledOptimizer)


class Backend(ABC, Generic[Optimizer]):
    """One trainer rank; see `verst.protocols.TrainBackend` for who calls what when.

    The constructor of a backend makes `_optimizer`, and ends with `_rest.keep`.
    """

    _optimizer: Optimizer

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self._given = self._config = config  # the latter is what the loaded step is trained by
        self._device = device
        self._temperature = config.rollout.temperature  # of the distribution that was sampled
        self._algorithm = with_own_loss(algorithm_for(config.algorithm), config.algorithm)
        self._step: LoadedStep | None = None
        self._loss_is_finite = True
        self._broken: list[str] = []  # samples of this update
        self._rest = AtRest(rank, self._held)
        self._pace: Pace | None = None  # of a rank among others
        self._critic: Critic[Any] | None = None
        self._training_memory, self._weights_memory = Offload(device), Offload(device)

    @property
    def num_updates(self) -> int:
        """Updates each step makes: minibatches times epochs."""
        return self._config.train.minibatches * self._config.train.epochs

    @property
    @abstractmethod
    def routed_experts(self) -> RoutedExperts | None:
        """See `verst.protocols.TrainBackend`."""

    @property
    def routes_wanted(self) -> RoutesWanted | None:
        """None, too, if routes are switched off, or if nothing is sampled to train on."""
        return self._routes_wanted() if self.routed_experts is not None and records_routes(self._config) else None

    # ---- one step

    def load_batch(self, batch: Batch) -> StepScores:
        """Plans a decoded batch and computes the log-probabilities that the algorithm needs before its first update.

        The mismatch is tallied here if the trainer's are among them, else by the first `forward_backward`.
        Raises `ModelError` if a token is not in the model's vocabulary, and `CorruptWeights` if the weights are not those that the last
        update left.
        """
        self._require("load_batch")
        self._rest.require(f"step {batch.step}")
        self._rest.forget()
        require_known_tokens(batch, self._vocabulary, self._config.model.path)
        self._config = config_at(self._given, batch.step)
        self._optimizer.follow(self._config.train)
        if self._critic is not None:
            self._critic.follow(self._config.train)
        self._optimizer.zero_grad()
        self._step = self._plan(batch)
        scores = self._score_step(self._step)
        if self._critic is not None:
            self._step.values = self._critic.score(self._step)
            scores.values = self._step.values if self._reports else {}
        return scores

    def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[NDArray[np.float32]] = ()) -> Tally:
        """Accumulates one update's gradients. `advantages` and `returns` have one entry for each sample of the whole batch."""
        step = self._loaded("forward_backward")
        step.require_fitting("advantages", advantages)
        if self._critic is not None:
            step.require_fitting("returns", returns)
        self._optimizer.zero_grad()
        self._loss_is_finite, self._broken = True, []
        if self._pace is not None:
            self._pace.begin()
        tally = self._accumulate(step, update, advantages)
        if self._critic is not None:
            told = self._critic.accumulate(step, update, returns)
            tally = tally.merge(told) if self._reports else tally
        if self._pace is not None:
            self._pace.tell(tally)
        return tally

    def progress(self) -> Progress:
        """How far the call is that another thread is in."""
        return Progress(0, waits=False) if self._pace is None else self._pace.progress()

    def optimizer_step(self, update: int) -> Tally:
        """Clips and steps, or skips: the same decision on every rank. Raises `TrainingDiverged` after too many skips in a row."""
        step = self._loaded("optimizer_step")
        name = f"update {update + 1} of {self.num_updates} of step {step.batch.step}"
        if step.is_empty(update) or self._critic_alone(step):
            tally = self._optimizer.pass_over()
        else:
            tally = self._optimizer.step(name, loss_is_finite=self._loss_is_finite, broken=self._broken)
        if self._critic is not None:
            tally.merge(self._critic.optimizer.pass_over() if step.is_empty(update) else self._critic.optimizer_step(name))
        if update == self.num_updates - 1:
            self._settle()
            self._rest.keep(f"the last update of step {step.batch.step}")
        return tally

    def _critic_alone(self, step: LoadedStep) -> bool:
        """Whether the step is one of those that begin a run by training the critic."""
        return self._critic is not None and step.batch.step <= self._critic.warmup_steps

    # ---- weights

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors by Hugging Face name; see `verst.protocols.TrainBackend`. A collective."""
        self._require("weights", all_of_it=False)
        return self._full_tensors()

    def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability [T] of each token given those before it, at temperature 1; entry 0 is 0. A collective."""
        self._require("logprobs", all_of_it=False)
        logprobs_T = np.zeros(len(tokens_T), dtype=np.float32)
        if len(tokens_T) > 1:
            logprobs_T[1:] = self._probe(tokens_T)
        return logprobs_T

    # ---- memory

    def release_memory(self, *, weights: bool) -> None:
        """Gives up the device memory of optimizer, gradients, reference and critic and, with `weights`, of parameters and buffers.

        Repeating it changes nothing. Gradients are gone, so `load_batch` comes first afterwards.
        """
        if not self._training_memory.is_away:
            self._step = None
            self._optimizer.zero_grad()
            self._settle()
            kept = [*self._optimizer.tensors().values(), *_tensors_of(self._reference_modules())]
            dropped = self._optimizer.gradient_buffers()
            if self._critic is not None:
                self._critic.optimizer.zero_grad()
                dropped += self._critic.optimizer.gradient_buffers()
                kept += (*self._critic.optimizer.tensors().values(), *_tensors_of(self._critic.modules))
            policy = _tensors_of(self._policy_modules())
            self._training_memory.release(kept, dropped, but=policy)
        if weights and not self._weights_memory.is_away:
            self._weights_memory.release(_tensors_of(self._policy_modules()))

    def resume_memory(self) -> None:
        """Takes all of it back, bit for bit. Raises `ConfigError` if others hold too much of the device."""
        self._weights_memory.take_back()
        self._training_memory.take_back()

    def _require(self, what: str, *, all_of_it: bool = True) -> None:
        """Raises `InvariantViolation` if memory is given up that this call would touch."""
        if self._weights_memory.is_away or (all_of_it and self._training_memory.is_away):
            raise InvariantViolation(f"{what} needs memory that release_memory gave up: resume_memory comes first")

    def _loaded(self, what: str) -> LoadedStep:
        self._require(what)
        if self._step is None:
            raise InvariantViolation("no batch is loaded: load_batch comes before forward_backward and optimizer_step")
        return self._step

    @property
    def _reports(self) -> bool:
        """Whether this rank tells of what it computes, where others compute the same."""
        return True

    # ---- what a backend fills in

    @property
    @abstractmethod
    def _vocabulary(self) -> int:
        """Tokens the model knows."""

    @property
    def _scores_first(self) -> bool:
        """Whether the batch is scored before its first update; else that update's forward is the pass that measures."""
        return self._algorithm.needs_old_logprobs(self._config.algorithm, self.num_updates)

    @abstractmethod
    def _routes_wanted(self) -> RoutesWanted | None:
        """Which recorded routes this rank replays or compares, of a model that has some and an algorithm that learns from samples."""

    @abstractmethod
    def _plan(self, batch: Batch) -> LoadedStep: ...

    @abstractmethod
    def _score_step(self, step: LoadedStep) -> StepScores: ...

    @abstractmethod
    def _accumulate(self, step: LoadedStep, update: int, advantages: Estimates) -> Tally:
        """Forward and backward of one update's microbatches; what this rank tells of them."""

    @abstractmethod
    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    @abstractmethod
    def _probe(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """[T − 1], without the first token's."""

    @abstractmethod
    def _policy_modules(self) -> Sequence[nn.Module]: ...

    @abstractmethod
    def _reference_modules(self) -> Sequence[nn.Module]: ...

    @abstractmethod
    def _held(self) -> Held:
        """What this rank trains, with what it publishes of it and with its reference model."""

    @abstractmethod
    def _settle(self) -> None:
        """Ends what still runs on the memory of the policy."""


def _tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers; of those that are sharded this rank's part."""
    return [local_part(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())]
