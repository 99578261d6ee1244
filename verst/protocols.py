"""The seams of Verst: what each part promises the others. No torch at run time.

Who calls whom: the loop drives `TrainBackend` ranks and rollout workers; a rollout worker drives one `Engine` and, for each trajectory, one
`Environment` or `Rollout`; a scorer calls the `Reward`; the loop asks each `SampleFilter` and `TrainingHook` in its process. Every one of
them can be replaced by a plain class with these methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from verst.types import (
    Completion,
    Estimates,
    GenerateRequest,
    Generation,
    Group,
    Manifest,
    Message,
    PauseMode,
    Prompt,
    Reply,
    RoutedExperts,
    RoutesWanted,
    Sample,
    Trajectory,
)

if TYPE_CHECKING:
    import torch

    from verst.algorithms.losses import LossInputs
    from verst.observe.metrics import Tally
    from verst.rollout.tokens import TokenSession
    from verst.weights.group import GroupAddress


@runtime_checkable
class Environment(Protocol):
    """One conversation. A fresh instance serves one trajectory and is never used again.

    A class may also define a class method `check_machine(**options)`, which each replica calls once before it starts: it raises
    `ExtensionError` if the machine lacks what the environment needs. An object may have `tools`, functions in OpenAI's form that the chat
    template tells the model of; they are asked for once `start` has returned.
    """

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        """The opening messages, usually `prompt.messages`."""
        ...

    async def reply(self, completion: Completion) -> Reply:
        """The answer to what the model just said: new messages, or the end. Called once for each turn, also for one cut by a limit.

        An environment may also define `async close()`, which is called once when its trajectory has ended, however it ended.
        """
        ...


@runtime_checkable
class Rollout(Protocol):
    """Writes one trajectory by itself, token by token. Named by `rollout.environment: rollout:module:function`."""

    async def __call__(self, session: TokenSession, prompt: Prompt, /) -> Mapping[str, Any] | None:
        """Calls `session.generate` once or more; what it returns, JSON values, is the trajectory's `info`, which the reward sees.

        The tokens that are trained are those that `session.generate` returned, with the log-probabilities, versions and routes that the
        engine gave; no others can be. An exception fails this trajectory alone, and so does a pause between two calls that is longer than
        `rollout.deadline_s`. If the engine is lost, the function is called anew for the same trajectory with another one: as long as it
        asks for the same, it is given the same completions at once. So it must depend on prompt, completions and options alone.
        """
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores a whole trajectory. May be `async`. Its parameters: the trajectory and the prompt's fields.

    One whose first parameter is called `trajectories` is given all trajectories of a group that have not failed, in a list, and returns
    a number for each. An exception fails the group then, NaN or None its trajectory.
    """

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any], /) -> Any:
        """A finite number, or a `verst.fields.Score` with fields beside it.

        An exception, NaN or None marks the trajectory failed; it never becomes a silent 0.
        """
        ...


@runtime_checkable
class Advantages(Protocol):
    """How much better each trajectory was than expected: what its tokens are weighed by. Named by `algorithm.advantages`."""

    def __call__(self, rewards_N: NDArray[np.float64], groups_N: NDArray[np.int64], samples: Sequence[Sample], /) -> Any:
        """[N] finite numbers, of the trajectories of one batch. Each is known by the sample of its own conversation, and its branches share
        the number.

        `rewards_N` are those of `samples`, with what `kl_in: reward` and `overlong_share` take away; samples of one prompt have the same
        number in `groups_N`. A function of nothing else: a batch that is trained again must have the same advantages.
        """
        ...


@runtime_checkable
class Loss(Protocol):
    """What is made small. Named by `algorithm.loss`."""

    def __call__(self, inputs: LossInputs, /) -> Any:
        """[N] the loss of each token, or a `LossOutput` with metrics beside it; not their mean, since the divisor is the whole update's.

        A token's loss may depend on the tokens of its sample, which a microbatch has all of, and on no other sample.
        """
        ...


@runtime_checkable
class SampleFilter(Protocol):
    """Decides what of a finished group may be trained. In a process of its own; its answer must depend on the group alone.

    A group that no batch has taken yet when a run ends is asked about again when the run goes on.
    """

    def __call__(self, group: Group, /) -> str | Mapping[int, str] | None:
        """None keeps the group; text drops all of it, for that reason; {member: reason} leaves out these of `group.trajectories`.

        Members that have failed already are among them, and are not trained anyway. An exception drops the group.
        """
        ...


@runtime_checkable
class TrainingHook(Protocol):
    """Sees each step. One object serves a run, in a process of its own, from one start of the run to its end."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Called when a step is committed, with its metrics but for times. What it returns joins them, each name after `custom/`.

        A step that is trained again after a restart comes again.
        """
        ...


class ModelSpec(Protocol):
    """A decoder that transformers does not know, or that Verst reads wrongly. Named by `model.spec: module:object`.

    An object, or a class that is made without arguments; a subclass of this one needs the first three only. It is imported in each process
    that loads the model. `verst.testing.check_model_spec` compares what it says with the model's files.
    """

    model_type: str
    """As in config.json."""
    config_class: Any
    """A `transformers.PretrainedConfig` with that model_type."""
    model_class: Any
    """A `transformers.PreTrainedModel` that is a causal language model: a decoder (`get_decoder`), then one linear head.

    The `hf` engine needs its attention to go through transformers' interface, as that of the models in transformers does.
    """

    def checkpoint_name(self, parameter: str) -> str:
        """The Hugging Face name of a parameter or saved buffer, in the model's files and in what is published: one for each, one-to-one."""
        return parameter

    def moe(self, config: Mapping[str, Any]) -> tuple[Sequence[int], int, int] | None:
        """The decoder layers that route, their experts, and how many of them a token is given; `config` is config.json.

        None: as config.json says by the keys that families use (`verst.routing.kinds`).
        """
        return None

    def megatron_family(self) -> Any:
        """Its table for `train.backend: megatron`, a `verst.training.megatron.table.rows.Family`. None: that backend has none."""
        return None


class WeightUpdate(Protocol):
    """One policy version on its way into an engine."""

    @property
    def manifest(self) -> Manifest: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and CPU or device tensor, each once. Valid only until the next one is taken."""
        ...

    def checksum(self, tensor: torch.Tensor) -> str:
        """The hash the manifest uses; the same number on CPU and GPU."""
        ...


class Engine(Protocol):
    """Generates. Token ids in and out; all methods may be called concurrently from one event loop."""

    async def start(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> Generation:
        """Runs until a stop, a limit, or `abort`. A cancelled call ends its request. Raises `EngineFailure` if the engine broke."""
        ...

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        """Ends these requests (None: all) with `FinishReason.ABORT`; their tokens so far are returned."""
        ...

    async def in_flight(self) -> Sequence[Generation]:
        """What the requests have that are under way, as if they were aborted now. The newest tokens may be missing. They go on."""
        ...

    async def pause(self, mode: PauseMode = PauseMode.IN_PLACE) -> None:
        """Returns once no forward pass runs. What becomes of the requests in flight is the `mode`'s."""
        ...

    async def resume(self) -> None: ...

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        """Only while paused. Loads every tensor and returns the checksum of each as the engine now holds it.

        From then on new tokens carry `update.manifest.version`. The caller compares the checksums and resumes only if all match.
        """
        ...

    @property
    def weight_ranks(self) -> int:
        """Processes that receive weights, which is how many members of a weight group this engine becomes."""
        ...

    async def join_weight_group(self, address: GroupAddress, first_rank: int, timeout_s: float) -> None:
        """Becomes members `first_rank` and following of a weight group; a `GroupUpdate` comes by it. A collective of all members.

        Only while paused, once it generates. A group that it was in before is left.

        Raises `DeadlineExceeded` or `EngineFailure` if the sender did not come within `timeout_s`, or the others soon after it.
        """
        ...

    async def release_memory(self, *, weights: bool = True) -> None:
        """Only while paused. Gives up the device memory of keys and values and, with `weights`, of the weights, to others on the device.

        What it held is gone: requests in flight keep their place and their tokens, whose keys and values are computed anew after
        `resume`; weights have to be pushed before it. Repeating it changes nothing. `logprobs` and `update_weights` have to wait too.
        """
        ...

    async def resume_memory(self) -> None:
        """Takes all of it back. Repeating it changes nothing."""
        ...

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability of each token given those before it, at temperature 1, by a prefill; entry 0 is 0.

        May be called while paused. It is the probe that compares engine and trainer as soon as a version serves.
        """
        ...

    @property
    def version(self) -> int: ...

    @property
    def routed_experts(self) -> RoutedExperts | None:
        """What it records of each token's routes when a request asks for them; None for a dense model, or if it was not to record.

        Known once it has started.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters since start: `generated_tokens`, `prefill_tokens`, `decode_steps`, `decode_s`, `prefill_s`.

        `processed_tokens` grows with every token that is prefilled or decoded, not only as requests end: that it stands still means that
        the engine does. An engine that cannot tell leaves it out.

        Gauges: `running`, `waiting` (requests).
        """
        ...

    async def check(self) -> None:
        """Raises `EngineFailure` if the engine is broken for good: nothing that it is asked can succeed any more."""
        ...

    async def close(self) -> None: ...


class TrainBackend(Protocol):
    """One trainer rank. All methods are called on all ranks of a step in the same order; they may run collectives.

    A step is: `load_batch`, then for each update `forward_backward` on all ranks and, only when all ranks succeeded,
    `optimizer_step` on all ranks. The samples travel encoded (`verst.journal.codec.encode_batch`), their routes beside them: a rank's
    samples have those that it wants, of its own layers, and the other samples none.
    """

    def load_batch(self, batch: Any) -> BatchScores:
        """Takes a decoded `Batch` and computes the log-probabilities that the algorithm needs before its first update.

        Raises `CorruptWeights`, on every rank, if weights or optimizer state are not as the last update, or `load_state`, left them.
        """
        ...

    def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[NDArray[np.float32]] = ()) -> Tally:
        """Accumulates gradients of one update over its microbatches. `advantages` has one entry for each sample of the batch.

        `returns` [N] for each sample are what the critic, if there is one, is to predict at its loss tokens.
        """
        ...

    def optimizer_step(self, update: int) -> Tally:
        """Clips and steps, or skips the update if loss or gradient is not finite (`update/skipped` 1 on every rank)."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face name and full tensor, in the model's dtype; saved buffers follow. A collective: every rank iterates to the end."""
        ...

    def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """As `Engine.logprobs`, by the trainer: the other side of the probe. A collective."""
        ...

    def release_memory(self, *, weights: bool) -> None:
        """Between two steps: gives up the device memory of optimizer, gradients, reference and critic to others on the device.

        With `weights` also that of the parameters; without, `weights` and `logprobs` still work. All other calls raise
        `InvariantViolation` until `resume_memory`. Repeating it changes nothing. On all ranks alike.
        """
        ...

    def resume_memory(self) -> None:
        """Takes all of it back, bit for bit. Raises `ConfigError` if others hold too much of the device."""
        ...

    def state(self) -> BackendState:
        """A private CPU copy of this rank's model and optimizer shards, schedule and RNG, safe to write while training goes on."""
        ...

    def load_state(self, state: BackendState) -> None:
        """Restores `state()`, bit for bit. The state holds full tensors or this rank's shards; see `BackendState`."""
        ...

    @property
    def routed_experts(self) -> RoutedExperts | None:
        """How the model routes; None for a dense one."""
        ...

    @property
    def routes_wanted(self) -> RoutesWanted | None:
        """Which recorded routes this rank replays or compares its own with; None: it needs none."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates each step makes: minibatches times epochs."""
        ...


class BackendState(Protocol):
    """Tensors by name, plus JSON values.

    `full_shapes` says what each sharded tensor is a part of (split along dim 0); empty where `values` say it, in the backend's own way.
    """

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def values(self) -> Mapping[str, Any]: ...

    @property
    def full_shapes(self) -> Mapping[str, tuple[int, ...]]: ...


class BatchScores(Protocol):
    """What `load_batch` learned on one rank."""

    @property
    def tally(self) -> Tally: ...

    @property
    def reference_kl(self) -> Mapping[int, float]:
        """Sample index → Σ over its loss tokens of the KL estimate; empty without a reference."""
        ...

    @property
    def values(self) -> Mapping[int, NDArray[np.float32]]:
        """Sample index → [N], the critic's values before its loss tokens; empty without a critic."""
        ...
