"""What runs inside the actors: plain classes that tests drive without Ray.

A `RolloutWorker` is one replica: an engine, reward processes and all else that turns a prompt into a finished group. A `TrainerWorker` is
one trainer rank. Groups and batches cross the process boundary encoded (`verst.journal.codec`), never as Python objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.config.hub import with_local_model
from verst.config.schema import Config
from verst.errors import ModelError
from verst.observe.metrics import Tally
from verst.runtime.wait import gather_named, within
from verst.types import Group, Manifest, PauseMode, Prompt, RoutedExperts, RoutesWanted

if TYPE_CHECKING:
    from verst.protocols import WeightUpdate
    from verst.rewards.scorer import Scorer
    from verst.runtime.extensions import Extensions
    from verst.weights.group import GroupAddress


GROUP = "group"
"""In place of a location: the version is broadcast, not written."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version that can be brought to the engines. `probe_T`: the trainer's log-probabilities of the probe, if they are known already."""

    manifest: Manifest
    probe_T: NDArray[np.float32] | None = None


def turn_limit_s(config: Config) -> float:
    """Limit of a step up to its checkpoint, hand-overs of shared devices included. Every call in it has a limit of its own."""
    return (8 + 2 * config.train.minibatches * config.train.epochs) * config.train.deadline_s


def rolling_deadline_s(config: Config, groups: int, *, shared: bool) -> float:
    """Limit of rolling one group among so many: those that wait for a place in the engine get the time of those before them.

    `shared`: the trainer uses the device in between, once for each step that rollout may be ahead.
    """
    rollout = config.rollout
    limit_s = rollout.deadline_s * (1 + groups * rollout.group_size // rollout.max_running)
    if config.weights.in_flight == "finish":  # and for others to finish before a version that it waits for
        limit_s = 2 * limit_s + config.weights.deadline_s
    return limit_s + (config.worst_staleness * turn_limit_s(config) if shared else 0.0)


def drain_limit_s(config: Config) -> float:
    """Limit of finishing what is in flight before a version; 0 if it need not finish."""
    return rolling_deadline_s(config, config.capacity_groups, shared=False) if config.weights.in_flight == "finish" else 0.0


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Around what imports PyTorch and transformers: hundreds of thousands of objects that all stay. To search them for garbage again and
    again takes a fifth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a replica reports with a new version."""

    probe_T: NDArray[np.float32]  # the engine's log-probabilities of the probe
    stats: dict[str, float]  # the engine's counters and gauges


def _require_vocabulary(tokens: int, path: str) -> None:
    """Raises `ModelError` if the tokenizer is of another model. Tokens added to a vocabulary may lie beyond the model's: if never used."""
    from verst.config.plan import read_config

    config = read_config(path)
    known = config.get("text_config", config).get("vocab_size")
    if isinstance(known, int) and tokens > known:
        raise ModelError(
            f"model.path {path}: its tokenizer has {tokens} tokens, its config.json a vocab_size of {known}: give the tokenizer that "
            "belongs to the model"
        )


class RolloutWorker:
    """One engine replica with its chat renderer, environments, reward processes and weight updates.

    Scoring lies here, and not in one place for all replicas, because groups are here already and replicas grow in number with the run.
    """

    def __init__(
        self, config: Config, extensions: Extensions, replica: int, device: str, logs: Path, shared: bool = False, samples: int = 1
    ) -> None:
        """`samples`: trajectories of each prompt in an evaluation."""
        self._config = config
        self._extensions = extensions
        self._device = device
        self._replica = replica
        self._logs = logs
        self._shared = shared
        self._samples = samples
        self.engine: Any = None
        self._scorer: Scorer | None = None
        self._rolling = 0
        self._traffic = asyncio.Condition()
        self._draining = False

    async def start(self, scores: bool) -> RoutedExperts | None:
        """Loads the model and the tokenizer and, if the run `scores`, the reward. Raises `ModelError` or `ExtensionError`.

        Returns what the engine records of its routes.
        """
        with _imports():
            parts = {"the engine's modules": asyncio.to_thread(self._make)}
            if scores:  # its processes start beside: what the engine imports takes seconds
                parts["the reward"] = self._start_scorer()
            await gather_named(parts)
            await self.engine.start()
        self._rollers = {False: self._roller(evaluate=False), True: self._roller(evaluate=True)}
        return self.engine.routed_experts

    def _make(self) -> None:
        from verst.data.chat import ChatRenderer, load_tokenizer
        from verst.rollout.engines import make_engine
        from verst.rollout.environments import environment_factory

        config = self._config = with_local_model(self._config)
        rollout = config.rollout
        tokenizer = load_tokenizer(config.model.path)
        _require_vocabulary(tokenizer.vocab_size, config.model.path)
        self._renderer = ChatRenderer(tokenizer)
        self._environment = environment_factory(self._extensions.environment or rollout.environment, rollout.environment_options)
        log = self._logs / f"replica-{self._replica}.log"
        self.engine = make_engine(config, replica=self._replica, device=self._device, shared=self._shared, log=log)

    async def _start_scorer(self) -> None:
        from verst.rewards.scorer import Scorer
        from verst.rewards.spec import RewardSpec

        reward = self._config.reward
        spec = RewardSpec.of(reward, self._extensions.reward)
        self._scorer = Scorer(spec, workers=reward.workers, deadline_s=reward.deadline_s, log=self._logs / "rewards.log")
        await self._scorer.start()

    def _roller(self, *, evaluate: bool) -> Any:
        from verst.rollout.roll import GroupRoller
        from verst.types import Sampling

        config, rollout = self._config, self._config.rollout
        filters: dict[str, Any] = {} if evaluate else {"top_p": rollout.top_p, "top_k": rollout.top_k, "min_p": rollout.min_p}
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=config.eval.temperature if evaluate else rollout.temperature,
            stop=tuple(rollout.stop),
            **filters,
        )
        return GroupRoller(
            self.engine,
            self._renderer,
            self._environment,
            sampling=sampling,
            group_size=self._samples if evaluate else rollout.group_size,
            max_turns=rollout.max_turns,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_model_tokens=config.max_trajectory_tokens,
            seed=config.run.seed,
            environment_deadline_s=rollout.deadline_s,
        )

    async def roll(self, seq: int, prompt: Prompt, how: str) -> bytes:
        """Makes one finished group, encoded.

        `how`: "policy", "evaluation" (`samples` trajectories, its own sampling) or "demonstrations" (no engine and no reward).
        """
        from verst.journal.codec import encode_group

        if how == "demonstrations":
            return encode_group(self._rollers[False].demonstrate(seq, prompt))
        assert self._scorer is not None
        limit_s = rolling_deadline_s(self._config, self._rolling + 1, shared=self._shared)
        group = await within(self._rolled(seq, prompt, how), limit_s, f"the engine: rolling group {seq} ({prompt.id})")
        return encode_group(await self._scorer.score(group))

    async def _rolled(self, seq: int, prompt: Prompt, how: str) -> Group:
        async with self._traffic:
            await self._traffic.wait_for(lambda: not self._draining)
            self._rolling += 1
        try:
            return await self._rollers[how == "evaluation"].roll(seq, prompt)
        finally:
            async with self._traffic:
                self._rolling -= 1
                self._traffic.notify_all()

    async def drain(self) -> None:
        """Returns once nothing is in flight. What comes after waits for `admit`."""
        async with self._traffic:
            self._draining = True
            what = f"{self._rolling} groups to finish before a new version"
            await within(self._traffic.wait_for(lambda: not self._rolling), drain_limit_s(self._config), what)

    async def admit(self) -> None:
        async with self._traffic:
            self._draining = False
            self._traffic.notify_all()

    async def pull(self, manifest: Manifest, probe_T: NDArray[np.int32]) -> Pulled:
        """Loads one version, which serves if every checksum matches, and scores the probe with it."""
        from verst.weights.push import push

        weights, update = self._config.weights, self._update(manifest)
        mode = PauseMode.RETRACT if weights.in_flight == "recompute" else PauseMode.IN_PLACE
        logprobs_T = await push(self.engine, update, deadline_s=weights.deadline_s, probe_T=probe_T, in_flight=mode)
        assert logprobs_T is not None
        return Pulled(logprobs_T, dict(self.engine.stats()))

    def _update(self, manifest: Manifest) -> WeightUpdate:
        from verst.weights.files import FileUpdate
        from verst.weights.group import GroupUpdate
        from verst.weights.layout import BUCKET_BYTES

        if manifest.location != GROUP:
            return FileUpdate(manifest)
        return GroupUpdate(manifest, BUCKET_BYTES, self._config.weights.deadline_s)

    async def release_memory(self) -> None:
        """Gives all of the engine's device memory to the trainer. What is in flight waits, and goes on after the next `pull`."""
        await self.engine.pause()
        await self.engine.release_memory()

    async def resume_memory(self) -> None:
        await self.engine.resume_memory()

    async def weight_ranks(self) -> int:
        """Members of the weight group that this replica's engine becomes."""
        return self.engine.weight_ranks

    async def join_group(self, address: GroupAddress, first_rank: int) -> None:
        """The engine takes its places among those the trainer broadcasts to. A collective."""
        await self.engine.join_weight_group(address, first_rank, self._config.weights.deadline_s)

    async def probe_tokens(self, prompt: Prompt) -> NDArray[np.int32]:
        """The tokens both sides score at every publish: the start of a real prompt."""
        tokens_T = self._renderer.opening(prompt.messages)
        self._rollers[False].check_prompt(prompt, len(tokens_T))
        return tokens_T[:64]

    async def close(self) -> None:
        if self._scorer is not None:
            await self._scorer.close()
        if self.engine is not None:  # None: it could not be started
            await self.engine.close()


@dataclass(frozen=True, slots=True)
class TrainerFacts:
    """What is known of a rank once it has started."""

    num_updates: int  # of each step
    routed_experts: RoutedExperts | None
    routes_wanted: RoutesWanted | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What a rank learned from a batch before its first update (the picklable half of `BatchScores`)."""

    tally: Tally
    reference_kl: dict[int, float]


class TrainerWorker:
    """One trainer rank: backend, publishing and checkpoint files."""

    def __init__(self, config: Config, rank: int, device: str) -> None:
        self._config = config
        self._rank = rank
        self._device = device

    def rendezvous(self) -> str:
        """An address on this rank's machine where all ranks can meet."""
        from verst.training.distributed import Rendezvous

        self._rendezvous = Rendezvous()
        return self._rendezvous.address

    def start(self, rendezvous: str | None) -> TrainerFacts:
        """Loads the model; joins the other ranks if there are any."""
        with _imports():
            from verst.training.backends import make_backend
            from verst.training.distributed import init_distributed

            self._config = with_local_model(self._config)
            world = self._config.train.ranks
            if rendezvous is not None:
                init_distributed(self._rank, world, rendezvous, timeout_s=self._config.train.deadline_s, device=self._device)
            self.backend = make_backend(self._config, rank=self._rank, world=world, device=self._device)
        return TrainerFacts(self.backend.num_updates, self.backend.routed_experts, self.backend.routes_wanted)

    def load_batch(self, encoded: bytes, routes: bytes | None) -> Scores:
        """`routes`: those that this rank wants, of the samples that it computes."""
        from verst.journal.codec import decode_batch, decode_routes

        batch = decode_batch(encoded)
        if routes is not None:
            known = decode_routes(routes)
            batch = replace(batch, samples=tuple(replace(s, routes=known.get(i)) for i, s in enumerate(batch.samples)))
        scores = self.backend.load_batch(batch)
        return Scores(scores.tally, dict(scores.reference_kl))

    def forward_backward(self, update: int, advantages: Sequence[float]) -> Tally:
        return self.backend.forward_backward(update, advantages)

    def optimizer_step(self, update: int) -> Tally:
        return self.backend.optimizer_step(update)

    def publish(self, version: int, location: str | None, probe_T: NDArray[np.int32]) -> Published | None:
        """Hashes the weights and, given a location, writes them for the engines. Rank 0 returns what the engines need.

        A collective: every rank takes part in gathering the tensors. The call that reads the weights for the engines scores the probe,
        because their memory may be given up right after it: this one, if it writes a file, else `send`.
        """
        from verst.weights.files import describe, publish
        from verst.weights.location import remove_versions

        writes = bool(location) and location != GROUP
        weights = self.backend.weights()
        manifest: Manifest | None = None
        if self._rank:
            for _ in weights:
                pass
        elif location and writes:
            manifest = publish(version, weights, location)
            remove_versions(location, keep={version - 1, version})  # the one before may still be on its way into an engine
        else:
            manifest = replace(describe(version, weights), location=location or "")
        logprobs_T = self.backend.logprobs(probe_T) if writes else None
        return None if manifest is None else Published(manifest, logprobs_T)

    def host_group(self, name: str, world: int, shared: bool) -> GroupAddress:
        """Opens the place where the weight group meets. Rank 0 only; `join_group` follows."""
        from verst.training.distributed import own_address
        from verst.weights.group import GroupAddress, open_store

        host = "127.0.0.1" if shared else own_address()
        self._store = open_store(host, timeout_s=self._config.weights.deadline_s, listen=True)
        return GroupAddress(host, self._store.port, name, world, shared)

    def join_group(self, address: GroupAddress) -> None:
        """Becomes the sender. Rank 0 only; a collective with the replicas."""
        from verst.weights.group import SENDER, enter

        self._group = enter(self._store, address, SENDER, device=self._device, timeout_s=self._config.weights.deadline_s)

    def send(self, manifest: Manifest, probe_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Broadcasts the weights that `publish` described, before anything changes them, and scores the probe. A collective."""
        from verst.weights.group import send
        from verst.weights.layout import BUCKET_BYTES

        weights = self.backend.weights()
        if self._rank:
            for _ in weights:
                pass
        else:
            send(self._group, manifest, weights, bucket_bytes=BUCKET_BYTES, deadline_s=self._config.weights.deadline_s)
        return self.backend.logprobs(probe_T)

    def release_memory(self, weights: bool) -> None:
        self.backend.release_memory(weights=weights)

    def resume_memory(self) -> None:
        self.backend.resume_memory()

    def snapshot(self, directory: str, step: int) -> dict[str, Any]:
        """Copies this rank's state and begins to write it in the background. Returns the model's fingerprint."""
        from verst.training.checkpoints import CheckpointWriter, fingerprint

        state = self.backend.state()
        self._writer = CheckpointWriter(Path(directory), step, rank=self._rank, world=self._config.train.ranks)
        self._writer.begin(state)
        return fingerprint(state)

    async def written(self) -> Any:
        """Waits for the file begun by `snapshot`, while training goes on. Returns its record for the manifest.

        Raises `CheckpointError` if it could not be written.
        """
        return await asyncio.to_thread(self._writer.finish)

    def restore(self, directory: str, step: int) -> None:
        """Takes this rank's part of a verified checkpoint. The place in the schedule is that of this run's step."""
        from verst.training.checkpoints import load_state

        state = load_state(Path(directory), step, rank=self._rank, world=self._config.train.ranks)
        self.backend.load_state(replace(state, values={**state.values, "update": step * self.backend.num_updates}))

    def export(self, directory: str) -> None:
        """Writes the current weights with config and tokenizer as a Hugging Face directory. A collective."""
        from verst.training.export import export_model

        weights = self.backend.weights()
        if self._rank:
            for _ in weights:
                pass
        else:
            export_model(self._config.model.path, {n: t.cpu().clone() for n, t in weights}, Path(directory))

    def close(self) -> None:
        from verst.training.distributed import leave_distributed

        leave_distributed()
