"""What runs in a replica's actor: a plain class that tests drive without Ray. Groups leave it encoded (`verst.journal.codec`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst import secrets
from verst.config.algorithms import DistillConfig
from verst.config.checks import scores
from verst.config.evaluated import Evaluated, evaluated, samples_of
from verst.config.hub import model_directory, with_local_model
from verst.config.schema import Config
from verst.observe.waits import Waits
from verst.rollout.clock import Clock
from verst.rollout.loopback import bypass_proxies
from verst.rollout.recorded import Piece, Recorded
from verst.rollout.user_loop import UserLoop
from verst.runtime.actors import is_actor
from verst.runtime.extensions import Extensions
from verst.runtime.imports import large_imports
from verst.runtime.limits import drain_limit_s, hold_s, rolling_deadline_s, teacher_deadline_s
from verst.runtime.trainer_worker import GROUP
from verst.runtime.wait import gather_named, within
from verst.types import Generation, Group, Manifest, PauseMode, Prompt, RoutedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verst.protocols import WeightUpdate
    from verst.rewards.scorer import Scorer
    from verst.rollout.teacher import Teacher
    from verst.runtime.shared_scorer import SharedScorer
    from verst.weights.group import GroupAddress


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a replica reports with a new version."""

    probe_T: NDArray[np.float32]  # the engine's log-probabilities of the probe
    stats: dict[str, float]  # the engine's counters and gauges


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a replica has when another loop takes over."""

    slot: int
    started: bool  # whether its engine runs
    finished: tuple[bytes, ...]  # groups, encoded, that may not have reached the journal
    in_flight: Mapping[int, Sequence[Piece]]  # by admission number, what was generated of the others


@dataclass(frozen=True, slots=True)
class Seat:
    """A replica's places in a weight group: from `first_rank` on, one for each rank of its engine."""

    address: GroupAddress
    first_rank: int


def replica_worker(config: Config, extensions: bytes | None, *rest: Any) -> RolloutWorker:
    """A replica's worker in a process of its own, whose environment holds no secrets from here on: what is unpacked here is user code.

    `rest`: the arguments of `RolloutWorker` after its extensions. Raises `ExtensionError` if a variable of `run.secrets` is not set.
    """
    secrets.require(config.run.secrets)
    if is_actor():
        secrets.take(config.run.secrets)
        bypass_proxies(os.environ)  # before a client of user code is made
    return RolloutWorker(config, Extensions.unpack(extensions), *rest)


class RolloutWorker:
    """One engine replica with its chat renderer, environments, reward processes and weight updates.

    Scoring lies here, because groups are here already and replicas grow in number with the run. A reward with a GPU is in one place for all
    replicas (`verst.runtime.shared_scorer`).
    """

    def __init__(  # noqa: PLR0913, PLR0917 - each is a fact of the replica
        self,
        config: Config,
        extensions: Extensions,
        replica: int,
        device: str,
        logs: Path,
        shared: bool = False,
        samples: int = 1,
        slot: int | None = None,
        teacher_device: str | None = None,
    ) -> None:
        """`samples`: trajectories of each prompt of the held-out share. `slot`: of its URL and log; default: its number.

        `teacher_device`: of the teacher, if the algorithm has one. None: it is not asked, as in an evaluation of its own.
        """
        self._config = config
        self._extensions = extensions
        self._device, self._teacher_device = device, teacher_device
        self._replica, self._slot = replica, replica if slot is None else slot
        self._logs, self._shared, self._samples = logs, shared, samples
        self.engine: Any = None
        self._scorer: Scorer | SharedScorer | None = None
        self._teacher: Teacher | None = None
        self._scores = scores(config, reward_given=extensions.reward is not None)
        self._environment: Any = None
        self._rolling = self._trajectories = 0  # groups, and what is rolled of them
        self._tasks: set[asyncio.Task[Group]] = set()
        self._clock = Clock()
        self._traffic = asyncio.Condition()
        self._draining = False
        self._pulls = asyncio.Lock()
        self._started = False
        self._finished: dict[int, bytes] = {}
        self._recorded: dict[int, Recorded] = {}
        self._users = UserLoop(hold_s(config))
        self._waits = Waits()  # of groups by their numbers, of trajectories by their ids

    async def start(self, scores: bool) -> RoutedExperts | None:
        """Loads the model and the tokenizer and, if the run `scores`, the reward. Raises `ModelError` or `ExtensionError`.

        Returns what the engine records of its routes.
        """
        with large_imports():
            parts = {"the engine's modules": asyncio.to_thread(self._make)}
            if scores:  # its processes start beside: what the engine imports takes seconds
                parts["the reward"] = self._start_scorer()
            await gather_named(parts)
            await self.engine.start()
            if self._teacher is not None:
                await self._teacher.start()
        self._started = True
        self._rollers = {"policy": self._roller(), **{one.how: self._roller(one) for one in evaluated(self._config)}}
        return self.engine.routed_experts

    def _make(self) -> None:
        from verst.data.chat import ChatRenderer, load_tokenizer, require_vocabulary
        from verst.model_spec import install
        from verst.rollout.answers import answer_paths
        from verst.rollout.engines import make_engine
        from verst.rollout.environments import check_machine, environment_factory
        from verst.rollout.sandbox import hide

        with secrets.lent():  # the hub's library looks for its token in the environment
            config = self._config = with_local_model(self._config)
            teacher = self._teacher_directory()
        install(config.model.spec)
        hide(answer_paths(config))
        rollout = config.rollout
        tokenizer = load_tokenizer(config.model.path)
        require_vocabulary(tokenizer.vocab_size, config.model.path)
        self._renderer = ChatRenderer(tokenizer)
        self._environment = environment_factory(self._extensions.environment or rollout.environment, rollout.environment_options)
        check_machine(self._environment)
        log = self._logs / f"replica-{self._slot}.log"  # by which a server that outlived the one before in this place is found and ended
        self._teacher = None if teacher is None else self._make_teacher(tokenizer, teacher)
        self.engine = make_engine(config, slot=self._slot, device=self._device, shared=self._shared, log=log)

    def _teacher_directory(self) -> Path | None:
        algorithm = self._config.algorithm
        return model_directory(algorithm.teacher) if isinstance(algorithm, DistillConfig) and self._teacher_device else None

    def _make_teacher(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Teacher:
        from verst.data.chat import load_tokenizer
        from verst.rollout.engines import make_teacher
        from verst.rollout.teacher import Teacher, require_same_tokens

        assert self._teacher_device is not None
        require_same_tokens(tokenizer, load_tokenizer(directory), str(directory))
        return Teacher(make_teacher(self._config, str(directory), self._teacher_device))

    async def _start_scorer(self) -> None:
        from verst.runtime.shared_scorer import make_scorer

        self._scorer = make_scorer(self._config, self._extensions.reward, self._logs / "rewards.log")
        await self._scorer.start()

    def _roller(self, one: Evaluated | None = None) -> Any:
        """For training, or for a set that is evaluated."""
        from verst.rollout.roll import GroupRoller
        from verst.types import Sampling

        config, rollout = self._config, self._config.rollout
        filters: dict[str, Any] = {"top_p": rollout.top_p, "top_k": rollout.top_k, "min_p": rollout.min_p} if one is None else {}
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature if one is None else one.temperature,
            stop=tuple(rollout.stop),
            **filters,
        )
        return GroupRoller(
            self.engine,
            self._renderer,
            self._environment,
            sampling=sampling,
            group_size=rollout.group_size if one is None else self._samples * one.samples,
            oversample=rollout.oversample if one is None else 0,
            max_turns=rollout.max_turns,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_model_tokens=config.max_trajectory_tokens,
            seed=config.run.seed,
            environment_deadline_s=rollout.deadline_s,
            engine_name=f"the engine of replica {self._replica}",
            waits=self._waits,
            clock=self._clock,
            users=self._users,
        )

    async def roll(self, seq: int, prompt: Prompt, how: str, known: Sequence[Piece] = ()) -> bytes:
        """Makes one finished group, encoded. What is not rolled or scored by its limit has failed.

        `known`: what a replica that was lost had generated of it.

        `how`: "policy", "demonstrations" (no engine and no reward), or `how` of an `Evaluated` set, which has its own sampling.
        """
        from verst.journal.codec import encode_group

        if how == "demonstrations":
            return encode_group(self._rollers["policy"].demonstrate(seq, prompt))
        try:
            if how == "policy":
                self._recorded[seq] = Recorded(self.engine, known)
            group = await self._scored(await self._rolled(seq, prompt, how), how)
            encoded = encode_group(group)
        finally:
            self._recorded.pop(seq, None)
            self._waits.end(seq)
        if how == "policy":
            self._keep(seq, encoded)
        return encoded

    async def _scored(self, group: Group, how: str) -> Group:
        """With what teacher and reward say of it, where they are asked."""
        if how == "policy" and self._teacher is not None:
            self._waits.begin(group.seq, "its teacher")
            group = await within(self._teacher.judge(group), teacher_deadline_s(self._config), f"the teacher of replica {self._replica}")
        if how == "policy" and not self._scores:
            return group
        assert self._scorer is not None
        self._waits.begin(group.seq, "its rewards")
        return await self._scorer.score(group)

    def _keep(self, seq: int, encoded: bytes) -> None:
        """For another loop, if this one dies before the group is in its journal: of the newest groups, as many as there are slots."""
        self._finished[seq] = encoded
        if len(self._finished) > self._config.capacity_groups:
            del self._finished[next(iter(self._finished))]

    async def _rolled(self, seq: int, prompt: Prompt, how: str) -> Group:
        self._waits.begin(seq, "a new version to come")
        async with self._traffic:
            await self._traffic.wait_for(lambda: not self._draining)
            self._rolling += 1
        self._waits.end(seq)  # its trajectories say now what they wait for
        trajectories = self._samples * samples_of(self._config, how) or self._config.rolled_per_group
        self._trajectories += trajectories
        limit_s = rolling_deadline_s(self._config, self._trajectories, self._samples)
        rolling = asyncio.ensure_future(self._rollers[how].roll(seq, prompt, limit_s, self._recorded.get(seq)))
        self._tasks.add(rolling)
        rolling.add_done_callback(self._ended)
        try:
            await asyncio.wait({rolling})  # which a cancelled caller leaves at once, also where an environment swallows its cancellation
            return rolling.result()
        finally:
            rolling.cancel()
            self._rolling -= 1
            self._trajectories -= trajectories
            async with self._traffic:
                self._traffic.notify_all()

    def _ended(self, rolling: asyncio.Task[Group]) -> None:
        self._tasks.discard(rolling)
        if not rolling.cancelled():
            rolling.exception()  # of one that was given up nobody asks

    async def standing(self) -> dict[int, tuple[str, float]]:
        """What each group here waits for, and for how many seconds: of its trajectories the one that has waited longest speaks for it."""
        found: dict[int, tuple[str, float]] = {}
        for key, awaited, seconds in self._waits.now():
            seq = key if isinstance(key, int) else int(str(key).partition("/")[0])
            found.setdefault(seq, (awaited, seconds))
        return found

    async def news(self) -> dict[int, list[Piece]]:
        """What was generated of each group here since this was last asked."""
        so_far = await self._so_far()
        news = {seq: recorded.news(so_far) for seq, recorded in self._recorded.items()}
        return {seq: pieces for seq, pieces in news.items() if pieces}

    async def _so_far(self) -> dict[str, Generation]:
        return {generation.id: generation for generation in await self.engine.in_flight()}

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

    async def pull(self, manifest: Manifest, probe_T: NDArray[np.int32], seat: Seat | None = None) -> Pulled:
        """Loads one version, which serves if every checksum matches, and scores the probe with it.

        `seat`: the engine takes its places in a new weight group before. A collective of trainer and replicas, which needs it paused.
        """
        async with self._pulls:  # one that was given up may still wait for its tensors
            return await self._pull(manifest, probe_T, seat)

    async def _pull(self, manifest: Manifest, probe_T: NDArray[np.int32], seat: Seat | None) -> Pulled:
        from verst.weights.push import push

        self._clock.stop()  # until a version serves: after an error the engine stays paused
        weights, update = self._config.weights, self._update(manifest)
        mode = PauseMode.RETRACT if weights.in_flight == "recompute" else PauseMode.IN_PLACE
        if seat is not None:
            await within(self.engine.pause(mode), weights.deadline_s, "the engine to pause for a new weight group")
            await self.engine.join_weight_group(seat.address, seat.first_rank, weights.deadline_s)
        logprobs_T = await push(self.engine, update, deadline_s=weights.deadline_s, probe_T=probe_T, in_flight=mode)
        self._clock.go()
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
        self._clock.stop()
        await self.engine.pause()
        await self.engine.release_memory()

    async def resume_memory(self) -> None:
        await self.engine.resume_memory()

    async def check(self) -> None:
        """Answers while its process runs. Raises `EngineFailure` if its engine does not work any more."""
        if self.engine is not None:
            await self.engine.check()
        if self._teacher is not None and self._started:
            await self._teacher.check()

    async def adopt(self) -> Adopted:
        """Another loop takes over from one that died. What was in flight is given up, what was finished is handed over."""
        so_far = await self._so_far() if self._started else {}
        in_flight = {seq: recorded.all(so_far) for seq, recorded in self._recorded.items()}
        for rolling in self._tasks:
            rolling.cancel()
        await self.admit()
        finished, self._finished = tuple(self._finished.values()), {}
        return Adopted(self._slot, self._started, finished, in_flight)

    async def routed_experts(self) -> RoutedExperts | None:
        """What the engine records of its routes."""
        return self.engine.routed_experts

    async def weight_ranks(self) -> int:
        """Members of the weight group that this replica's engine becomes."""
        return self.engine.weight_ranks

    async def probe_tokens(self, prompt: Prompt) -> NDArray[np.int32]:
        """The tokens both sides score at every publish: the start of a real prompt."""
        tokens_T = self._renderer.opening(prompt.messages)
        self._rollers["policy"].check_prompt(prompt, len(tokens_T))
        return tokens_T[:64]

    async def close(self) -> None:
        from verst.rollout.agent import Agents

        if self._scorer is not None:
            self._scorer.close()
        if isinstance(self._environment, Agents):
            await self._environment.close()
        self._users.close()
        for part in (self.engine, self._teacher):
            if part is not None:  # None: it could not be started, or there is no teacher
                await part.close()
