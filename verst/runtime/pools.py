"""All trainer ranks as one, and all replicas as one: who is called, and for how long we wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import CheckpointError, VerstError
from verst.journal.codec import decode_group, encode_batch
from verst.observe.metrics import Tally, merged
from verst.runtime.actors import Worker
from verst.runtime.wait import within
from verst.runtime.workers import Probe, Scores
from verst.types import Batch, Group, Manifest, Prompt, Status


async def gather_named(calls: Sequence[Any]) -> list[Any]:
    """Runs calls together. The first failure is raised once all have ended, so that none is left running behind an error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        raise next((e for e in errors if isinstance(e, VerstError)), errors[0])
    return results


class Trainers:
    """Every rank of the trainer, called together."""

    def __init__(self, workers: Sequence[Worker], config: Config, put: Callable[[bytes], Any]) -> None:
        self._workers = workers
        self._deadline_s = config.train.deadline_s
        self._put = put
        self.num_updates = 0

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return await gather_named([within(w.call(method, *args), self._deadline_s, f"{w.name}: {method}") for w in self._workers])

    async def start(self) -> None:
        rendezvous = None
        if len(self._workers) > 1:
            rendezvous = await within(self._workers[0].call("rendezvous"), self._deadline_s, "trainer rank 0: rendezvous")
        self.num_updates = (await self._all("start", rendezvous))[0]

    async def load_batch(self, batch: Batch) -> Scores:
        """Hands every rank the batch, through the object store, and merges what they learned from it."""
        scores = await self._all("load_batch", self._put(encode_batch(batch)))
        return Scores(merged(s.tally for s in scores), {i: kl for s in scores for i, kl in s.reference_kl.items()})

    async def forward_backward(self, update: int, advantages: Sequence[float]) -> Tally:
        return merged(await self._all("forward_backward", update, advantages))

    async def optimizer_step(self, update: int) -> Tally:
        """Only called once every rank finished its backward pass: all ranks step, or none."""
        return merged(await self._all("optimizer_step", update))

    async def publish(self, version: int, location: str | None, probe_T: NDArray[np.int32] | None) -> tuple[Manifest, NDArray[np.float32]]:
        return (await self._all("publish", version, location, probe_T))[0]

    async def snapshot(self, directory: str, step: int) -> dict[str, Any]:
        return (await self._all("snapshot", directory, step))[0]

    async def written(self) -> list[Any]:
        """Waits until every rank's checkpoint file is on disk. Raises `CheckpointError`."""
        try:
            return await self._all("written")
        except OSError as error:
            raise CheckpointError(f"a trainer rank could not write its checkpoint file: {error}") from error

    async def restore(self, directory: str, step: int) -> None:
        await self._all("restore", directory, step)

    async def export(self, directory: str) -> None:
        await self._all("export", directory)

    async def close(self) -> None:
        await self._all("close")


class Replicas:
    """Every rollout replica. Groups go to the one with the fewest in flight; new weights go to all."""

    def __init__(self, workers: Sequence[Worker], config: Config) -> None:
        self._workers = workers
        self._config = config
        self._in_flight = [0] * len(workers)

    async def _all(self, method: str, deadline_s: float, *args: Any) -> list[Any]:
        return await gather_named([within(w.call(method, *args), deadline_s, f"{w.name}: {method}") for w in self._workers])

    async def start(self) -> None:
        await self._all("start", self._config.train.deadline_s)

    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """One group, rolled by the least busy replica: as it travelled, for the scorer, and decoded."""
        index = min(range(len(self._workers)), key=lambda i: self._in_flight[i])
        worker, rollout = self._workers[index], self._config.rollout
        self._in_flight[index] += 1
        # the limit is of rolling one group: those that wait for a place in the engine get the time of those before them
        deadline_s = rollout.deadline_s * (1 + self._in_flight[index] * rollout.group_size // rollout.max_running)
        try:
            encoded = await within(worker.post("roll", seq, prompt, how), deadline_s, f"{worker.name}: rolling group {seq} ({prompt.id})")
        finally:
            self._in_flight[index] -= 1
        return encoded, decode_group(encoded)

    async def pull(self, manifest: Manifest, probe: Probe | None) -> float:
        """Every replica loads and verifies one version. Returns the largest probe difference."""
        # twice the limit: one retry of the whole push, inside the worker, has the same limit again
        return max(await self._all("pull", 2 * self._config.weights.deadline_s + 5, manifest, probe))

    async def probe_tokens(self, prompt: Prompt) -> NDArray[np.int32]:
        return await within(self._workers[0].call("probe_tokens", prompt), self._config.weights.deadline_s, "replica 0: probe tokens")

    async def close(self) -> None:
        await self._all("close", 30.0)


class Scoring:
    """The scorer, which keeps worker processes of its own."""

    def __init__(self, worker: Worker, config: Config) -> None:
        self._worker = worker
        self._start_deadline_s = config.train.deadline_s
        # each trajectory of a group at its own limit on one worker, and that worker restarted between them
        self.deadline_s = config.rollout.group_size * (config.reward.deadline_s + 10.0)
        self._in_flight = 0

    async def start(self) -> None:
        await within(self._worker.call("start"), self._start_deadline_s, f"{self._worker.name}: start")

    async def score(self, encoded: bytes, group: Group) -> Group:
        """The group with rewards; a trajectory that could not be scored is marked failed. `encoded` is the same group, as it travelled."""
        self._in_flight += 1
        who = f"{self._worker.name}: scoring group {group.seq} ({group.prompt.id})"
        try:  # groups wait for each other's workers, so each brings its own time along
            outcomes = await within(self._worker.post("score", encoded), self._in_flight * self.deadline_s, who)
        finally:
            self._in_flight -= 1
        scored = (
            t if t.status is Status.FAILED else t.failed(error) if error else replace(t, reward=reward)
            for t, (reward, error) in zip(group.trajectories, outcomes, strict=True)
        )
        return replace(group, trajectories=tuple(scored))

    async def close(self) -> None:
        await within(self._worker.call("close"), 30.0, f"{self._worker.name}: close")
