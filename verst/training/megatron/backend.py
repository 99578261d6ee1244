"""The `megatron` backend: one trainer rank on Megatron-Core, from one process to tensor, pipeline, context, expert and data parallelism.

A step is the same as with every backend; see `verst.protocols.TrainBackend` for who calls what when. What is particular here:

- Data-parallel ranks have different microbatches. The ranks that share one (tensor, context, pipeline) compute its loss alike; only one of
  them, in the last pipeline stage, tells of it, so that nothing is counted twice. Of routes each rank tells: its routers see tokens and
  layers that no other rank's see.
- Each token carries its weight in the whole update's loss, so gradients are summed over data- and context-parallel ranks and never
  averaged: every layout has the gradient of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import AutoConfig

from verst.algorithms.kl import kl_per_sample
from verst.config.algorithms import PpoConfig
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.observe.metrics import Tally
from verst.protocols import BackendState
from verst.routing.kinds import routed_experts
from verst.training.base import Backend
from verst.training.distributed import device_of, require_group
from verst.training.loss import policy_loss
from verst.training.megatron import arguments as megatron_arguments
from verst.training.megatron import compat
from verst.training.megatron.layout import join
from verst.training.megatron.packed import Packed, in_rounds, pack, pack_probe
from verst.training.megatron.table.families import family_of
from verst.training.microbatch import split
from verst.training.model import require_files
from verst.training.pace import Pace
from verst.training.rest import Held, unique
from verst.training.state import RankState
from verst.training.step import LoadedStep, PerSample, StepScores, kl_estimator, plan_batch
from verst.types import Batch, Estimates, RoutedExperts, RoutesWanted

_KEEPS_ADDRESSES: Mapping[str, Any] = {"cuda_graph_impl": "none", "nccl_ub": False}
"""Megatron's arguments under which recorded graphs or NCCL hold addresses of parameters and gradients, and their values without that."""

if TYPE_CHECKING:
    from verst.training.megatron.critic import MegatronCritic
    from verst.training.megatron.routes import Routers

OnOutput = Callable[[Packed, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a microbatch with its log-probabilities [N] and entropies [N] on the last pipeline stage; returns the loss to go back from."""


class MegatronBackend(Backend[Any]):
    """One trainer rank. From two ranks on, `init_distributed` comes first; the constructor is a collective then.

    `arguments` are Megatron's own, by name. Raises `ConfigError` if they do not fit each other, the model or the number of ranks, or if
    Megatron-Core is not installed, and `ModelError` if the model cannot be loaded or its family has no table.
    """

    def __init__(self, config: Config, *, rank: int, world: int, device: str | None, arguments: Mapping[str, Any]) -> None:
        require_group(rank, world)
        compat.require()
        super().__init__(config, rank, device_of(device, deterministic=config.run.deterministic))
        require_files(Path(config.model.path).expanduser())
        self._hf_config = AutoConfig.from_pretrained(Path(config.model.path).expanduser())
        self._family = family_of(self._hf_config, config.model.path)
        self._kind = routed_experts(self._hf_config.to_dict())
        self._args = megatron_arguments.parse(config, arguments, self._hf_config, self._family, world)
        self._layout = megatron_arguments.layout_of(self._args)
        join(self._layout, self._device.type, config.train.deadline_s)
        self._place = _Place()
        self._build()
        self._rest.keep("its start", always=True)

    # ---- routes

    @property
    def routed_experts(self) -> RoutedExperts | None:
        return self._kind

    def _routes_wanted(self) -> RoutesWanted | None:
        """None, too, for a rank whose stages have no layer that routes."""
        if self._routers is None or not self._routers.layers:
            return None
        return RoutesWanted(self._place.data, self._layout.data, self._routers.layers, packed=True)

    # ---- one step

    @property
    def _reports(self) -> bool:
        return self._place.reports

    @property
    def _vocabulary(self) -> int:
        return self._hf_config.vocab_size

    def _plan(self, batch: Batch) -> LoadedStep:
        step = plan_batch(self._config, batch, self._place.data, self._layout.data, self._device, packed=True)
        if self._routers is not None and self.routes_wanted is not None:
            self._routers.require(step)
        return step

    def _score_step(self, step: LoadedStep) -> StepScores:
        routes = Tally()
        for update in range(self._config.train.minibatches):  # every epoch has the same microbatches
            microbatches = self._microbatches(step, update)
            if self._scores_first:
                step.old |= self._score(self._chunks, self._with_routes(step, microbatches))
                self._tally_routes(routes)
            if self._reference is not None:
                step.reference |= self._score(self._reference, microbatches)
        scores = self._scores(step) if self._place.reports else StepScores(Tally(), {})
        scores.tally.merge(routes)
        return scores

    def _accumulate(self, step: LoadedStep, update: int, advantages: Estimates) -> Tally:
        tally, told = Tally(), Tally()
        take = partial(self._loss, step, update, step.weights(update), advantages, tally)
        microbatches = self._with_routes(step, self._microbatches(step, update))
        self._run(self._chunks, microbatches, take, self._temperature, measured=update == 0 and not self._scores_first)
        self._tally_routes(told)
        return told.merge(tally) if self._place.reports else told

    # ---- weights and state

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the model's dtype, tied ones once; the bias of expert choice in float32."""
        _gather(self._chunks)
        yield from self._tensors.full()

    def _probe(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        found = self._score(self._chunks, [pack_probe(tokens_T, self._layout, self._device)], temperature=1.0)
        values = torch.from_numpy(found[0]) if found else torch.zeros(len(tokens_T) - 1)
        return self._place.from_last_stage(values.to(self._device)).cpu().numpy()

    def state(self) -> RankState:
        """A private CPU copy of this rank's shards of masters and moments, of the counters and of torch's random state."""
        from verst.training.megatron.state import capture

        self._require("state")
        self._rest.require_own("its state was copied")
        return capture(self._optimizer, self._layout, self._tensors, self._critic_state())

    def load_state(self, state: BackendState) -> None:
        """Restores `state()` bit for bit; one that was read from a checkpoint also on another layout. Raises `CheckpointError`."""
        from verst.training.megatron.state import restore

        self._require("load_state")
        restore(self._optimizer, state, self._layout, self._tensors, self._critic_state())
        self._step = None
        self._settle()
        self._rest.keep("the state was restored", always=True)

    def _critic_state(self) -> tuple[Any, Any] | None:
        return None if self._values is None else (self._values.optimizer, self._values.tensors)

    def release_memory(self, *, weights: bool) -> None:
        """See `Backend.release_memory`. Raises `ConfigError` for options of Megatron that remember where memory lies."""
        for name, without in _KEEPS_ADDRESSES.items():
            if getattr(self._args, name, without) != without:
                raise ConfigError(f"train.megatron.{name} keeps addresses of memory that is handed over where GPUs are shared: remove it")
        super().release_memory(weights=weights)

    def _policy_modules(self) -> list[Any]:
        return [chunk.module for chunk in self._chunks]

    def _reference_modules(self) -> list[Any]:
        return self._reference or []

    # ---- inside

    def _build(self) -> None:
        from verst.training.megatron.files import WeightFiles
        from verst.training.megatron.optimizer import MegatronAdamW
        from verst.training.megatron.parallel import transformer_config, wrap
        from verst.training.megatron.tensors import ModelTensors

        files = WeightFiles(self._config.model.path)
        with compat.quiet():
            config = transformer_config(self._args)
            chunks = self._loaded_chunks(config)
            self._tensors = ModelTensors(chunks, self._family, self._hf_config, files)
            self._tensors.load()
            if self._layout.world > 1 and getattr(self._args, "cuda_graph_impl", "none") == "none":  # a recorded graph calls no hooks
                self._pace = Pace((layer for chunk in chunks for layer in chunk.decoder.layers), self._device)
            self._chunks = wrap(chunks, config, self._args)
            self._optimizer = MegatronAdamW(self._args, self._chunks, self._config.train, self.num_updates, self._config.run.steps)
            self._optimizer.give_model_its_parameters()
            self._routers = self._tapped()
            self._reference = self._reference_tensors = None
            if self._algorithm.needs_reference(self._config.algorithm):
                self._reference = self._loaded_chunks(transformer_config(self._args))
                self._reference_tensors = ModelTensors(self._reference, self._family, self._hf_config, files)
                self._reference_tensors.load()
                for chunk in self._reference:
                    chunk.requires_grad_(False)
            self._critic = self._values = self._built_critic()  # for the frame, and as what it is here
            if self._values is not None and self._pace is not None:
                self._pace.follow(self._values.layers)

    def _built_critic(self) -> MegatronCritic | None:
        options = self._config.algorithm
        if not isinstance(options, PpoConfig):
            return None
        from verst.training.megatron.critic import MegatronCritic

        place = {"layout": self._layout, "data_rank": self._place.data, "device": self._device}
        return MegatronCritic(self._config, options, self._args, self._hf_config, self._family, **place, num_updates=self.num_updates)

    def _loaded_chunks(self, config: Any) -> list[Any]:
        from verst.training.megatron.model import build_chunks

        return build_chunks(config, self._hf_config, self._layout.virtual, self._device, compiled=self._config.train.compile)

    def _tapped(self) -> Routers | None:
        from verst.training.megatron.routes import Routers

        if self._kind is None:
            return None
        replays = self._config.train.routes == "replay"
        return Routers(self._chunks, self._kind, self._hf_config.to_dict(), replays=replays)

    def _held(self) -> Held:
        from verst.training.megatron.copies import copies_of, names_of, updated

        weights = names_of(self._tensors, "weights")
        reference = {} if self._reference_tensors is None else names_of(self._reference_tensors, "reference")
        held, copies = [weights, updated(self._optimizer, self._tensors), reference], copies_of(self._tensors, "weights")
        if self._values is not None:
            held.append(self._values.held())
            copies |= self._values.copies()
        return Held(unique(*held), copies)

    def _settle(self) -> None:
        _gather(self._chunks)
        if self._values is not None:
            _gather(self._values.chunks)

    def _microbatches(self, step: LoadedStep, update: int) -> list[Packed]:
        return [pack(step.batch.samples, i, self._layout, self._device) for i in step.plan.updates[update].ranks[self._place.data]]

    def _with_routes(self, step: LoadedStep, microbatches: Sequence[Packed]) -> list[Packed]:
        if self._routers is None or self.routes_wanted is None:
            return list(microbatches)
        return [self._routers.lay_out(step, packed) for packed in microbatches]

    def _tally_routes(self, tally: Tally) -> None:
        if self._routers is not None:
            self._routers.tally(tally)

    def _run(
        self,
        chunks: Sequence[Any],
        microbatches: Sequence[Packed],
        take: OnOutput,
        temperature: float,
        *,
        measured: bool,
        score_only: bool = False,
    ) -> None:
        """Drives the microbatches through all stages, and back unless they are only scored. A collective.

        `measured`: the policy's routes are compared with those recorded, if there are any.
        """
        from verst.training.megatron.model import forward
        from verst.training.megatron.parallel import schedule

        if not microbatches:
            return
        microbatches = in_rounds(microbatches, self._layout, self._device)
        around = None
        if self._routers is not None:
            self._routers.begin()
            around = partial(self._routers.during, measured=measured)
        forward_scores = partial(forward, temperature=temperature, vocabulary=self._hf_config.vocab_size)

        def take_scores(packed: Packed, scores: torch.Tensor) -> torch.Tensor:
            return take(packed, scores[0], scores[1].detach())

        schedule(chunks, microbatches, forward_scores, take_scores, score_only=score_only, around=around)

    @torch.no_grad()
    def _score(self, chunks: Sequence[Any], microbatches: Sequence[Packed], temperature: float | None = None) -> PerSample:
        """Log-probabilities of each sample's loss tokens, on the ranks of the last pipeline stage."""
        found: PerSample = {}

        def take(packed: Packed, logprobs_N: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            if packed.loss_tokens:
                found.update(split(logprobs_N.cpu().numpy(), packed))
            return logprobs_N

        self._run(chunks, microbatches, take, temperature or self._temperature, measured=True, score_only=True)
        return found

    def _scores(self, step: LoadedStep) -> StepScores:
        tally, reference_kl = Tally(), {}
        for update in range(self._config.train.minibatches):
            for packed in self._microbatches(step, update):
                if not packed.loss_tokens:
                    continue
                policy = step.behaviour(packed)
                if step.old:
                    policy = np.concatenate([step.old[i] for i in packed.indices])
                    step.tally_fidelity(tally, packed, policy)
                if step.reference:
                    reference = np.concatenate([step.reference[i] for i in packed.indices])
                    reference_kl |= kl_per_sample(policy, reference, packed.sample_of_token(), kl_estimator(self._config))
        return StepScores(tally, reference_kl)

    def _loss(
        self,
        step: LoadedStep,
        update: int,
        weights: PerSample,
        advantages: Estimates,
        tally: Tally,
        packed: Packed,
        logprobs_N: torch.Tensor,
        entropy_N: torch.Tensor,
    ) -> torch.Tensor:
        if not packed.loss_tokens:
            return logprobs_N.sum() * 0.0
        if update == 0 and not step.old:  # the weights are still those the step began with
            step.tally_fidelity(tally, packed, logprobs_N.detach().cpu().numpy())
        loss, is_finite, broken = policy_loss(self._algorithm, step, packed, (logprobs_N, entropy_N), weights, advantages, tally)
        self._loss_is_finite &= is_finite
        self._broken += broken
        return loss


def _gather(chunks: Sequence[Any]) -> None:
    """Ends the gathering of parameters that overlaps with the next forward, before they are read otherwise."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            with compat.quiet():
                chunk.disable_forward_pre_hook()
                chunk.enable_forward_pre_hook()


class _Place:
    """Where this rank stands in the layout."""

    def __init__(self) -> None:
        from verst.training.megatron import groups

        self.data = groups.data().rank()
        self._pipeline = groups.pipeline()
        first = groups.tensor().rank() == 0 and groups.context().rank() == 0
        self.reports = first and self._pipeline.rank() == self._pipeline.size() - 1

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._pipeline.size() > 1:
            dist.broadcast(tensor, group=self._pipeline, group_src=self._pipeline.size() - 1)
        return tensor
