"""One process that scores for all replicas, an actor of Ray with GPUs of its own: for a reward that holds a model.

It belongs to the replica that was first to ask for it, and ends with that. Whoever finds it dead makes it anew, or finds the one that
another replica has made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from verst.config.schema import Config, RewardConfig
from verst.errors import RewardFailure
from verst.journal.codec import decode_group, encode_group
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.runtime.actors import LocalWorker, Worker, WorkerDied, spawn
from verst.runtime.cluster import NAMESPACE
from verst.runtime.wait import NoAnswer, within
from verst.types import Group

_ROLE = "the shared reward"
_ATTEMPTS = 3
_SCHEDULING_S = 120.0
_AGAIN_S = 1.0
_ASKED_S = 10.0
_SILENCE_S = 60.0
"""Rewards have their own deadline there, so what is asked every `_ASKED_S` seconds is whether the process answers at all."""


def make_scorer(config: Config, given: Callable[..., Any] | None, log: Path) -> Scorer | SharedScorer:
    """A replica's: of its own, or its end of the one for all. `given`: the reward from Python, in place of the run file's."""
    reward, secrets = config.reward, config.run.secrets
    spec = RewardSpec.of(reward, given, config.model.path)
    if reward.actor_gpus is not None:
        return SharedScorer(reward, spec, log, secrets)
    return Scorer(spec, workers=reward.workers, deadline_s=reward.deadline_s, log=log, secrets=secrets)


class ScorerHost:
    """What runs in the actor: reward processes, as a replica would have of its own."""

    def __init__(self, reward: RewardConfig, spec: RewardSpec, log: Path, secrets: Sequence[str]) -> None:
        limits: dict[str, Any] = {"workers": reward.workers, "deadline_s": reward.deadline_s}
        self._scorer = Scorer(spec, **limits, log=log, secrets=secrets, gpus=bool(reward.actor_gpus))
        self._starting = asyncio.Lock()
        self._started = False

    async def start(self) -> None:
        """Every replica calls it. Raises `ExtensionError` if the reward cannot be loaded."""
        async with self._starting:
            if not self._started:
                await self._scorer.start()
                self._started = True

    async def score(self, group: bytes) -> bytes:
        await self.start()
        return encode_group(await self._scorer.score(decode_group(group)))

    def close(self) -> None:
        self._scorer.close()


class SharedScorer:
    """A replica's end of it, in place of a `Scorer`."""

    def __init__(self, reward: RewardConfig, spec: RewardSpec, log: Path, secrets: Sequence[str] = ()) -> None:
        """`log` is in the run's directory, by which the replicas of one run find the same process."""
        self._reward, self._spec, self._log, self._secrets = reward, spec, log, secrets
        self._worker: Worker | None = None
        self._here: ScorerHost | None = None
        self._finding = asyncio.Lock()

    async def start(self) -> None:
        """Raises `ExtensionError` if the reward cannot be loaded, `DeadlineExceeded` if Ray finds no place for it."""
        await (await self._found()).call("start")

    async def score(self, group: Group) -> Group:
        """As `Scorer.score`. A group whose process died is scored again; `RewardFailure` if that happens three times."""
        encoded, losses = encode_group(group), list[WorkerDied]()
        while len(losses) < _ATTEMPTS:
            worker = await self._found()
            try:
                return decode_group(await _answer(worker, encoded))
            except WorkerDied as error:
                if self._worker is worker:
                    self._worker = None
                losses.append(error)
        raise RewardFailure(f"{_ROLE} died {_ATTEMPTS} times while it scored group {group.seq}: {losses[-1]}")

    def close(self) -> None:
        """Its process may score for others. It ends with the replica that it belongs to."""
        if self._here is not None:
            self._here.close()

    async def _found(self) -> Worker:
        async with self._finding:
            if self._worker is None:
                self._worker = await self._made()
            return self._worker

    async def _made(self) -> Worker:
        given = self._reward, self._spec, self._log, self._secrets
        if not ray.is_initialized():
            self._here = self._here or ScorerHost(*given)
            return LocalWorker(_ROLE, self._here)
        gpus, deadline = self._reward.actor_gpus or 0.0, time.monotonic() + _SCHEDULING_S
        while True:
            worker = spawn(_ROLE, ScorerHost, *given, gpus=gpus, name=f"reward of {self._log}", namespace=NAMESPACE, get_if_exists=True)
            try:
                await within(worker.where(), _SCHEDULING_S, f"Ray to start {_ROLE} with {gpus:g} GPUs: are so many free?")
                return worker
            except WorkerDied:  # the former one: Ray takes seconds to free its name
                worker.kill()  # which also makes this process forget whom that name meant
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)


async def _answer(worker: Worker, group: bytes) -> bytes:
    """Raises `WorkerDied` also if it does not answer; it is ended then."""
    scoring = asyncio.ensure_future(worker.post("score", group))
    try:
        while True:
            done, _ = await asyncio.wait({scoring}, timeout=_ASKED_S)
            if done:
                return scoring.result()
            await within(worker.ping(), _SILENCE_S, f"{_ROLE} to answer")
    except NoAnswer as error:
        worker.kill()
        raise WorkerDied(str(error)) from error
    finally:
        scoring.cancel()
