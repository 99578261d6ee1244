"""The `fsdp` backend: any transformers causal language model, plain on one rank, sharded by FSDP2 from two on.

One rank of it is one `FsdpBackend`, a plain object that its process drives; see `verst.protocols.TrainBackend` for who calls what when.

Precision. With `model.dtype` bfloat16 the forward pass uses the very weights the engines hold: the float32 masters, rounded. Autocast
over float32 weights would round elsewhere and disagree with the engines. One rank keeps masters beside the bfloat16 model; with several,
the shards are the masters and FSDP2 rounds them as it gathers. Either way gradients are summed over microbatches in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from verst.algorithms.kl import kl_per_sample
from verst.config.algorithms import PpoConfig
from verst.config.schema import Config
from verst.exact.rows import filled
from verst.model_spec import published_name
from verst.observe.metrics import Tally
from verst.protocols import BackendState
from verst.routing.kinds import routed_experts
from verst.routing.tap import RoutingTap
from verst.training.base import Backend
from verst.training.distributed import device_of, place, release, require_group, whole
from verst.training.fsdp_critic import FsdpCritic
from verst.training.loss import policy_loss
from verst.training.microbatch import Microbatch, split
from verst.training.model import Policy, load_model
from verst.training.optimizer import MasterAdamW
from verst.training.pace import Pace
from verst.training.rest import Held, unique
from verst.training.routes import PolicyRoutes
from verst.training.state import RankState, capture, restore
from verst.training.step import LoadedStep, PerSample, StepScores, kl_estimator, plan_batch
from verst.types import Batch, Estimates, RoutedExperts, RoutesWanted


class FsdpBackend(Backend[MasterAdamW]):
    """One trainer rank. From two ranks on, `init_distributed` comes first; the constructor is a collective then.

    `device` is `cpu`, `cuda` or `cuda:N`; None takes a GPU if there is one. Raises `ModelError` if the model cannot be loaded or followed.
    """

    def __init__(self, config: Config, *, rank: int, world: int, device: str | None) -> None:
        require_group(rank, world)
        super().__init__(config, rank, device_of(device, deterministic=config.run.deterministic))
        self._rank = rank
        self._world = world
        self._dtype = getattr(torch, config.model.dtype)
        self._routed: RoutedExperts | None = None
        self._routes: PolicyRoutes | None = None
        self._policy = self._load(trainable=True)
        self._reference = self._load(trainable=False) if self._algorithm.needs_reference(config.algorithm) else None
        self._pace = Pace(self._policy.layers, self._device) if world > 1 else None
        # Taken while the model is sharded: during a forward pass the modules hold gathered parameters under the same names.
        parameters = dict(self._policy.model.named_parameters())
        self._parameters = parameters
        self._saved = frozenset(self._policy.model.state_dict())
        self._reference_parameters = {} if self._reference is None else dict(self._reference.model.named_parameters())
        trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._optimizer = MasterAdamW(trainable, config.train, self.num_updates, config.run.steps)
        self._critic = self._load_critic()
        if self._critic is not None and self._pace is not None:
            self._pace.follow(self._critic.layers)
        self._rest.keep("its start", always=True)

    @property
    def routed_experts(self) -> RoutedExperts | None:
        return self._routed

    def _routes_wanted(self) -> RoutesWanted | None:
        kind = self._routed
        return None if kind is None else RoutesWanted(self._rank, self._world, tuple(range(kind.layers)), packed=False)

    # ---- one step

    @property
    def _vocabulary(self) -> int:
        return self._policy.vocabulary

    def _plan(self, batch: Batch) -> LoadedStep:
        step = plan_batch(self._config, batch, self._rank, self._world, self._device, multiple=self._policy.multiple)
        if self._routes is not None:
            self._routes.require(step)
        return step

    def _score_step(self, step: LoadedStep) -> StepScores:
        tally, reference_kl = Tally(), {}
        for update in range(self._config.train.minibatches):  # every epoch has the same microbatches
            for microbatch in step.microbatches(update):
                old = None
                if self._scores_first:
                    with self._during(step, microbatch, tally):
                        old = self._score(self._policy, microbatch)
                reference = self._score(self._reference, microbatch) if self._reference is not None else None
                if not microbatch.loss_tokens:
                    continue
                if old is not None:
                    step.old |= split(old, microbatch)
                    step.tally_fidelity(tally, microbatch, old)
                if reference is not None:
                    step.reference |= split(reference, microbatch)
                    policy = step.behaviour(microbatch) if old is None else old
                    reference_kl |= kl_per_sample(policy, reference, microbatch.sample_of_token(), kl_estimator(self._config))
        return StepScores(tally, reference_kl)

    def _accumulate(self, step: LoadedStep, update: int, advantages: Estimates) -> Tally:
        weights = step.weights(update)
        tally = Tally()
        first = update == 0 and not step.old  # the weights are still those the step began with
        for microbatch in step.microbatches(update):
            with self._during(step, microbatch, tally if first else None):
                logprobs_N, entropy_N = self._forward(self._policy, microbatch, self._temperature)
                if not microbatch.loss_tokens:
                    (logprobs_N.sum() * 0.0).backward()
                    continue
                if first:
                    step.tally_fidelity(tally, microbatch, logprobs_N.detach().cpu().numpy())
                self._backward(step, microbatch, (logprobs_N, entropy_N), weights, advantages, tally)
        return tally

    # ---- weights and state

    @torch.no_grad()
    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the model's dtype, tied ones once; then the model's saved buffers, in their own."""
        for name, parameter in self._parameters.items():
            yield self._published(name), whole(parameter, self._dtype)
        yield from ((self._published(name), buffer) for name, buffer in self._saved_buffers().items())

    def _published(self, name: str) -> str:
        return published_name(self._policy.model, name)

    def _saved_buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.detach() for name, buffer in self._policy.model.named_buffers() if name in self._saved}

    def _probe(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        tokens = torch.tensor(tokens_T, dtype=torch.int64, device=self._device)
        positions = torch.arange(len(tokens) - 1, device=self._device)
        microbatch = Microbatch((0,), filled(tokens[:-1], self._policy.multiple)[None], positions, tokens[1:], (len(positions),))
        return self._score(self._policy, microbatch, temperature=1.0)

    def state(self) -> RankState:
        """A private CPU copy of this rank's shards of masters and moments, of the counters and of torch's random state."""
        self._require("state")
        self._rest.require_own("its state was copied")
        return capture(self._optimizer, None if self._critic is None else self._critic.optimizer)

    def load_state(self, state: BackendState) -> None:
        """Restores `state()` bit for bit, from this rank's shards or from full tensors. Raises `CheckpointError` on another model's."""
        self._require("load_state")
        restore(self._optimizer, None if self._critic is None else self._critic.optimizer, state, self._rank, self._world)
        self._step = None
        self._rest.keep("the state was restored", always=True)

    def _policy_modules(self) -> list[nn.Module]:
        return [self._policy]

    def _reference_modules(self) -> list[nn.Module]:
        return [] if self._reference is None else [self._reference]

    def _held(self) -> Held:
        """Shards are of one rank each: no rank has a copy of another's."""
        weights = {f"weights/{name}": tensor for name, tensor in (*self._parameters.items(), *self._saved_buffers().items())}
        reference = {f"reference/{name}": tensor for name, tensor in self._reference_parameters.items()}
        critic = {} if self._critic is None else self._critic.held()
        return Held(unique(weights, self._optimizer.tensors(), reference, critic))

    def _settle(self) -> None:
        """Nothing runs between two calls."""

    # ---- inside

    def _load(self, *, trainable: bool) -> Policy:
        policy = Policy(load_model(self._config.model.path, self._dtype), self._config.model.path)
        train = self._config.train
        if self._is_exact:
            policy.make_exact(self._device)
        if trainable:
            self._follow_routes(policy)
        policy.prepare_layers(recompute=trainable and train.gradient_checkpointing, compile_each=train.compile)
        if not trainable:
            policy.requires_grad_(False)
        place(policy, self._device, self._world, kept_dtype=torch.float32 if trainable else self._dtype)
        return policy

    def _load_critic(self) -> FsdpCritic | None:
        options = self._config.algorithm
        if not isinstance(options, PpoConfig):
            return None
        return FsdpCritic(self._config, options, world=self._world, device=self._device, num_updates=self.num_updates)

    @property
    def _is_exact(self) -> bool:
        """Whether a token must get the log-probability that the engine gave it, to the bit. Compiled layers have sums of their own."""
        config = self._config
        sampled_by_hf = config.rollout.engine == "hf" and self._algorithm.learns_from == "policy"
        return config.run.deterministic and sampled_by_hf and not config.train.compile

    def _follow_routes(self, policy: Policy) -> None:
        """Raises `ModelError` if routes are wanted, but the model's cannot be followed."""
        self._routed = routed_experts(policy.model.config.get_text_config().to_dict())
        if self._routed is not None and self.routes_wanted is not None:
            tap = RoutingTap(policy.model, self._routed, compiled=self._config.train.compile)
            self._routes = PolicyRoutes(tap, replays=self._config.train.routes == "replay")

    def _during(self, step: LoadedStep, microbatch: Microbatch, tally: Tally | None) -> AbstractContextManager[None]:
        """Around a microbatch's passes through the policy, which then has its routes."""
        return nullcontext() if self._routes is None else self._routes.during(step, microbatch, tally)

    def _forward(self, policy: Policy, microbatch: Microbatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        return policy(microbatch.tokens_BT, microbatch.positions_N, microbatch.targets_N, temperature)

    @torch.no_grad()
    def _score(self, policy: Policy, microbatch: Microbatch, temperature: float | None = None) -> NDArray[np.float32]:
        logprobs_N, _ = self._forward(policy, microbatch, temperature or self._temperature)
        release(policy)
        return logprobs_N.cpu().numpy()

    def _backward(
        self,
        step: LoadedStep,
        microbatch: Microbatch,
        outputs: tuple[torch.Tensor, torch.Tensor],
        weights: PerSample,
        advantages: Estimates,
        tally: Tally,
    ) -> None:
        loss, is_finite, broken = policy_loss(self._algorithm, step, microbatch, outputs, weights, advantages, tally)
        loss.backward()
        self._loss_is_finite &= is_finite
        self._broken += broken
