"""All trainer ranks as one, and all replicas as one: who is called, and for how long we wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import CheckpointError, ConfigError, DeadlineExceeded, VerstError
from verst.journal.codec import decode_group, encode_batch, encode_group, encode_routes
from verst.observe.metrics import Tally, merged
from verst.observe.timeline import Timeline
from verst.runtime.actors import Worker
from verst.runtime.batching import given_up, routes_for
from verst.runtime.limits import drain_limit_s, group_deadline_s
from verst.runtime.rollout_worker import Pulled
from verst.runtime.trainer_worker import Published, Scores, TrainerFacts
from verst.runtime.wait import GRACE_S, gather_named, within
from verst.types import Batch, Group, Manifest, Prompt, RoutedExperts, RoutesWanted

if TYPE_CHECKING:
    from verst.weights.group import GroupAddress

_CLOSE_S = 30.0
"""Limit of ending a part, whose processes have nothing left to do."""

_ASK_S = 2.0
"""How long a replica may take to say what its groups wait for, when a run tells why it ends."""


class Trainers:
    """Every rank of the trainer, called together."""

    def __init__(self, workers: Sequence[Worker], config: Config, put: Callable[[bytes], Any]) -> None:
        self._workers = workers
        self._deadline_s = config.train.deadline_s
        self._put = put
        self._train = config.train
        self._wanted: list[RoutesWanted | None] = []
        self.num_updates = 0
        self.routed_experts: RoutedExperts | None = None
        """How the model routes, if recorded routes are needed."""

    async def _all(self, method: str, *args: Any, deadline_s: float | None = None, grace_s: float | None = None) -> list[Any]:
        return await self._each(method, [args] * len(self._workers), deadline_s=deadline_s, grace_s=grace_s)

    async def _each(
        self, method: str, args: Sequence[tuple[Any, ...]], *, deadline_s: float | None = None, grace_s: float | None = None
    ) -> list[Any]:
        """As `_all`, with arguments of its own for each rank."""
        limit = deadline_s or self._deadline_s
        calls = {
            (who := f"{w.name}: {method}"): within(w.call(method, *own), limit, who) for w, own in zip(self._workers, args, strict=True)
        }
        return await gather_named(calls, grace_s=grace_s or GRACE_S)

    async def _first(self, method: str, *args: Any) -> Any:
        """Of rank 0 alone."""
        return await within(self._workers[0].call(method, *args), self._deadline_s, f"{self._workers[0].name}: {method}")

    async def start(self) -> None:
        rendezvous = None
        if len(self._workers) > 1:
            rendezvous = await self._first("rendezvous")
        facts: list[TrainerFacts] = await self._all("start", rendezvous)
        self.num_updates = facts[0].num_updates
        self._wanted = [found.routes_wanted for found in facts]
        self.routed_experts = facts[0].routed_experts if any(self._wanted) else None

    async def load_batch(self, batch: Batch) -> Scores:
        """Hands every rank the batch, through the object store, with the routes that it needs, and merges what they learned from it."""
        encoded = self._put(encode_batch(batch))
        routes = self._routes(batch)
        scores = await self._each("load_batch", [(encoded, routes.get(wanted)) for wanted in self._wanted])
        return Scores(merged(s.tally for s in scores), {i: kl for s in scores for i, kl in s.reference_kl.items()})

    def _routes(self, batch: Batch) -> dict[RoutesWanted | None, Any]:
        """For each different want: the routes of the samples and layers in it, encoded and in the object store."""
        found: dict[RoutesWanted | None, Any] = {}
        for wanted in self._wanted:
            if wanted is None or wanted in found:
                continue
            found[wanted] = self._put(encode_routes(routes_for(batch, wanted, self._train)))
        return found

    async def forward_backward(self, update: int, advantages: Sequence[float]) -> Tally:
        return merged(await self._all("forward_backward", update, advantages))

    async def optimizer_step(self, update: int) -> Tally:
        """Only called once every rank finished its backward pass: all ranks step, or none."""
        return merged(await self._all("optimizer_step", update))

    async def publish(self, version: int, location: str | None, probe_T: NDArray[np.int32]) -> Published:
        return (await self._all("publish", version, location, probe_T))[0]

    async def host_group(self, name: str, world: int, *, shared: bool) -> GroupAddress:
        return await self._first("host_group", name, world, shared)

    async def join_group(self, address: GroupAddress) -> None:
        await self._first("join_group", address)

    async def send(self, manifest: Manifest, probe_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Sends a version; returns the trainer's log-probabilities of the probe."""
        return (await self._all("send", manifest, probe_T))[0]

    async def release_memory(self, *, weights: bool) -> None:
        await self._all("release_memory", weights)

    async def resume_memory(self) -> None:
        await self._all("resume_memory")

    async def snapshot(self, directory: str, step: int) -> dict[str, Any]:
        return (await self._all("snapshot", directory, step))[0]

    async def written(self) -> list[Any]:
        """Waits until every rank's checkpoint file is on disk, or could not be written. Raises `CheckpointError`.

        No rank waits for another here, and what one of them still writes must not be removed under it: so no grace ends the wait.
        """
        try:
            return await self._all("written", grace_s=self._deadline_s)
        except OSError as error:
            raise CheckpointError(f"a trainer rank could not write its checkpoint file: {error}") from error

    async def restore(self, directory: str, step: int) -> None:
        await self._all("restore", directory, step)

    async def export(self, directory: str) -> None:
        await self._all("export", directory)

    async def close(self) -> None:
        """Ends every rank in order, then its process: one that a collective holds cannot answer."""
        try:
            await self._all("close", deadline_s=_CLOSE_S)
        finally:
            for worker in self._workers:
                worker.kill()


class Replicas:
    """Every rollout replica. Groups go to the one with the fewest in flight; new weights go to all."""

    def __init__(self, workers: Sequence[Worker], config: Config, *, shared: bool = False, timeline: Timeline | None = None) -> None:
        self._workers = workers
        self._timeline = timeline or Timeline()
        self._timeline.replicas = range(len(workers))
        self._config = config
        self._shared = shared
        self._in_flight = [0] * len(workers)
        self._finished = 0  # groups that came back
        self._rolling: dict[int, tuple[Worker, float]] = {}  # of each group in flight: the replica that it is on, and since when
        self._routed_experts: RoutedExperts | None = None

    async def _all(self, method: str, deadline_s: float, *args: Any) -> list[Any]:
        return await gather_named({(who := f"{w.name}: {method}"): within(w.call(method, *args), deadline_s, who) for w in self._workers})

    async def start(self, scores: bool) -> None:
        self._routed_experts = (await self._all("start", self._config.train.deadline_s, scores))[0]

    def require_routes(self, needed: RoutedExperts | None) -> None:
        """Raises `ConfigError` unless the engines record the routes that the trainer needs."""
        if needed is not None and self._routed_experts != needed:
            raise ConfigError(
                f"train.routes: the trainer needs the routes of {needed.layers} layers, {needed.chosen} of {needed.experts} experts for "
                f"each token, but the {self._config.rollout.engine} engine records {self._routed_experts or 'none'}: "
                "use an engine that records them, or set train.routes=ignore"
            )

    def deadline_s(self, groups: int) -> float:
        """Limit of one group among so many on one replica: each brings its own time along for engine places and reward workers."""
        return group_deadline_s(self._config, groups, shared=self._shared)

    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """One group, rolled and scored by the least busy replica: encoded, for the journal, and decoded.

        One that does not come back in time has failed, and is taken back from its replica. That is the last resort: rolling and scoring
        have limits of their own. Raises `DeadlineExceeded` if no other group came back meanwhile either.
        """
        index = min(range(len(self._workers)), key=lambda i: self._in_flight[i])
        worker = self._workers[index]
        self._in_flight[index] += 1
        self._rolling[seq] = worker, time.monotonic()
        finished, limit_s = self._finished, self.deadline_s(self._in_flight[index])
        rolling = asyncio.ensure_future(worker.post("roll", seq, prompt, how))
        try:
            demonstrated = how == "demonstrations"  # which keeps no replica busy
            with nullcontext([]) if demonstrated else self._timeline.group(seq, prompt.id, index) as became:
                await asyncio.wait({rolling}, timeout=limit_s)
                awaited = "" if rolling.done() else (await self._standing(worker))[seq][0]  # asked before it is taken back
                if rolling.done():
                    encoded = await rolling
                    group = decode_group(encoded)
                    self._finished += 1
                else:
                    reason = f"waited {limit_s:g} s for {awaited}"
                    if self._finished == finished:
                        raise DeadlineExceeded(f"{reason}: group {seq} ({prompt.id}), and no other came back meanwhile")
                    group = given_up(seq, prompt, self._config.rollout.group_size if how == "policy" else 1, reason)
                    encoded = encode_group(group)
                became.append(group)
        finally:
            rolling.cancel()
            self._in_flight[index] -= 1
        del self._rolling[seq]  # not after an error, which ends the run: then it tells where the group was
        return encoded, group

    async def standing(self) -> dict[int, tuple[str, float]]:
        """What each group in flight waits for, and for how many seconds, as its replica says if it answers."""
        said = await asyncio.gather(*map(self._standing, self._workers))
        return {seq: wait for found in said for seq, wait in found.items()}

    async def _standing(self, worker: Worker) -> dict[int, tuple[str, float]]:
        """Of the groups on one replica."""
        try:
            known = await within(worker.call("standing"), _ASK_S, f"{worker.name} to say what it waits for", idle=True)
            here = worker.name
        except VerstError:
            known, here = {}, f"{worker.name}, which does not answer"
        found: dict[int, tuple[str, float]] = {}
        for seq, (on, begun) in self._rolling.items():
            if on is worker:
                awaited, seconds = known.get(seq, (here, time.monotonic() - begun))
                found[seq] = awaited if worker.name in awaited else f"{awaited} on {worker.name}", seconds
        return found

    async def pull(self, manifest: Manifest, probe_T: NDArray[np.int32]) -> list[Pulled]:
        """Every replica loads and verifies one version, serves it and scores the probe."""
        return await self._all("pull", self._config.weights.deadline_s + 5, manifest, probe_T)

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Nothing is in flight within, if it has to finish before a version (`weights.in_flight`). What comes meanwhile waits.

        On shared devices the engines are paused by then, and could finish nothing: their groups go on with the new version.
        """
        limit_s = 0.0 if self._shared else drain_limit_s(self._config)
        if not limit_s:
            yield
            return
        await self._all("drain", limit_s + 5)
        try:
            yield
        finally:
            await self._all("admit", _CLOSE_S)

    async def release_memory(self) -> None:
        await self._all("release_memory", self._config.weights.deadline_s)

    async def resume_memory(self) -> None:
        await self._all("resume_memory", self._config.weights.deadline_s)

    async def weight_ranks(self) -> list[int]:
        """Members of the weight group that each replica becomes."""
        return await self._all("weight_ranks", self._config.weights.deadline_s)

    async def join_group(self, address: GroupAddress, first_ranks: Sequence[int]) -> None:
        limit_s = self._config.weights.deadline_s + 15  # a rank that waited in vain says so itself
        calls = {w.name: w.call("join_group", address, first) for w, first in zip(self._workers, first_ranks, strict=True)}
        await gather_named({name: within(call, limit_s, f"{name}: join_group") for name, call in calls.items()})

    async def probe_tokens(self, prompt: Prompt) -> NDArray[np.int32]:
        return await within(self._workers[0].call("probe_tokens", prompt), self._config.weights.deadline_s, "replica 0: probe tokens")

    async def close(self) -> None:
        await self._all("close", _CLOSE_S)
