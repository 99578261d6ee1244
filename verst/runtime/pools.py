"""All trainer ranks as one, and all replicas as one: who is called, and for how long we wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
from verst.runtime.limits import drain_limit_s, evaluated_prompts, group_deadline_s, step_wait_s
from verst.runtime.replica import Replica, Stage
from verst.runtime.rollout_worker import Pulled, Seat
from verst.runtime.trainer_worker import Published, Scores, TrainerFacts
from verst.runtime.wait import GRACE_S, explained_by, gather_named, within
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

    async def send(self, manifest: Manifest, probe_T: NDArray[np.int32], address: GroupAddress | None = None) -> NDArray[np.float32]:
        """Sends a version, by a group that is formed first if an address is given; returns the trainer's log-probabilities of the probe."""
        return (await self._all("send", manifest, probe_T, address))[0]

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
    """Every rollout replica. Groups go to the one with the fewest in flight; new weights go to all.

    Their number may change while the run goes on (`verst.runtime.scaler`). A publish has the members that were there as it began; one that
    is new among them is given groups once it holds that version, and one that fails until then is refused and ends nothing.
    """

    def __init__(self, workers: Sequence[Worker], config: Config, *, shared: bool = False, timeline: Timeline | None = None) -> None:
        self._replicas = [Replica(number, worker) for number, worker in enumerate(workers)]
        self._numbers = itertools.count(len(workers))
        self._members: list[Replica] = []
        self._publishing = asyncio.Lock()
        self._timeline = timeline or Timeline()
        self._timeline.replicas = lambda: [replica.number for replica in self.active]
        self._config = config
        self._shared = shared
        self._scores = True
        self._rolling: dict[int, tuple[Replica, float]] = {}  # of each group in flight: the replica that it is on, and since when
        self._routed_experts: RoutedExperts | None = None
        self._needed: RoutedExperts | None = None

    @property
    def active(self) -> list[Replica]:
        """Those that are given groups."""
        return [replica for replica in self._replicas if replica.stage is Stage.SERVING]

    @property
    def members(self) -> Sequence[Replica]:
        """Those that take part in the publish in progress."""
        return tuple(self._members)

    async def _all(self, method: str, deadline_s: float, *args: Any, of: Sequence[Replica] | None = None) -> list[Any]:
        """By default: of those that serve."""
        chosen = self.active if of is None else of
        return await gather_named({(who := f"{r.name}: {method}"): within(r.worker.call(method, *args), deadline_s, who) for r in chosen})

    async def start(self, scores: bool) -> None:
        """Starts those that the run begins with."""
        self._scores = scores
        self._routed_experts = (await gather_named({f"{replica.name}: start": self._start(replica) for replica in self._replicas}))[0]

    async def _start(self, replica: Replica) -> RoutedExperts | None:
        """Returns what its engine records of its routes."""
        (recorded,) = await self._all("start", self._config.train.deadline_s, self._scores, of=[replica])
        (replica.weight_ranks,) = await self._all("weight_ranks", self._config.weights.deadline_s, of=[replica])
        return recorded

    def require_routes(self, needed: RoutedExperts | None) -> None:
        """Raises `ConfigError` unless the engines record the routes that the trainer needs."""
        self._needed = needed
        self._require_routes(self._routed_experts)

    def _require_routes(self, recorded: RoutedExperts | None) -> None:
        needed = self._needed
        if needed is not None and recorded != needed:
            raise ConfigError(
                f"train.routes: the trainer needs the routes of {needed.layers} layers, {needed.chosen} of {needed.experts} experts for "
                f"each token, but the {self._config.rollout.engine} engine records {recorded or 'none'}: "
                "use an engine that records them, or set train.routes=ignore"
            )

    def deadline_s(self, groups: int) -> float:
        """Limit of one group on a replica with so many training groups and, if the run evaluates, all evaluated prompts."""
        trajectories = groups * self._config.rolled_per_group + evaluated_prompts(self._config)
        return group_deadline_s(self._config, trajectories, shared=self._shared)

    def _trajectories(self, replica: Replica) -> int:
        """In flight on it, cut ones included."""
        return (replica.in_flight - replica.evaluating) * self._config.rolled_per_group + replica.evaluating

    @property
    def step_wait_s(self) -> float:
        """Limit of a step's wait for the next group."""
        return step_wait_s(self._config, shared=self._shared)

    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """One group, rolled and scored by the least busy replica: encoded, for the journal, and decoded.

        One that does not come back in time has failed, and is taken back from its replica. That is the last resort: rolling and scoring
        have limits of their own. Raises `DeadlineExceeded` if no other group came back from there meanwhile. One that its replica does not
        finish after it was told to leave is rolled again by another, with the same number and seeds.
        """
        evaluated = int(how == "evaluation")
        while True:
            replica = min(self.active, key=self._trajectories)
            replica.in_flight += 1
            replica.evaluating += evaluated
            self._rolling[seq] = replica, time.monotonic()
            demonstrated = how == "demonstrations"  # which keeps no replica busy
            try:
                with nullcontext([]) if demonstrated else self._timeline.group(seq, prompt.id, replica.number) as became:
                    encoded, group = await self._rolled(replica, seq, prompt, how)
                    became.append(group)
            except VerstError:
                if replica.stage is not Stage.LEAVING:
                    raise
                replica.rolled_again.append(seq)
            else:
                del self._rolling[seq]  # not after an error, which ends the run: then it tells where the group was
                return encoded, group
            finally:
                replica.evaluating -= evaluated
                replica.ended_one()

    async def _rolled(self, replica: Replica, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """What one replica makes of a group, or a failed one."""
        finished, limit_s = replica.finished, self.deadline_s(replica.in_flight - replica.evaluating)
        rolling = asyncio.ensure_future(replica.worker.post("roll", seq, prompt, how))
        try:
            await asyncio.wait({rolling}, timeout=limit_s)
            awaited = "" if rolling.done() else (await self._standing(replica))[seq][0]  # asked before it is taken back
            if rolling.done():
                encoded = await rolling
                replica.finished += 1
                return encoded, decode_group(encoded)
        finally:
            rolling.cancel()
        reason = f"waited {limit_s:g} s for {awaited}"
        if replica.finished == finished or replica.stage is Stage.LEAVING:
            raise DeadlineExceeded(f"{reason}: group {seq} ({prompt.id}), and no other came back from {replica.name} meanwhile")
        group = given_up(seq, prompt, self._config.rollout.group_size if how == "policy" else 1, reason)
        return encode_group(group), group

    async def standing(self) -> dict[int, tuple[str, float]]:
        """What each group in flight waits for, and for how many seconds, as its replica says if it answers."""
        said = await asyncio.gather(*map(self._standing, {replica for replica, _ in self._rolling.values()}))
        return {seq: wait for found in said for seq, wait in found.items()}

    async def _standing(self, replica: Replica) -> dict[int, tuple[str, float]]:
        """Of the groups on one replica."""
        name = replica.name
        asking = within(replica.worker.call("standing"), _ASK_S, f"{name} to say what it waits for", idle=True)
        known = await explained_by(asking, lambda error: None)
        here = name if known is not None else f"{name}, which does not answer"
        found: dict[int, tuple[str, float]] = {}
        for seq, (on, begun) in self._rolling.items():
            if on is replica:
                awaited, seconds = (known or {}).get(seq, (here, time.monotonic() - begun))
                found[seq] = awaited if name in awaited else f"{awaited} on {name}", seconds
        return found

    async def pull(
        self, manifest: Manifest, probe_T: NDArray[np.int32], seats: Mapping[Replica, Seat] | None = None
    ) -> dict[Replica, Pulled]:
        """Every member loads and verifies one version, serves it and scores the probe. Without those that were refused over it.

        `seats`: their places in a weight group that is formed first.
        """
        seats = seats or {}
        members = self.members
        pulled = await gather_named({f"{r.name}: pull": self._pull(r, manifest, probe_T, seats.get(r)) for r in members})
        return {replica: found for replica, found in zip(members, pulled, strict=True) if found is not None}

    async def _pull(self, replica: Replica, manifest: Manifest, probe_T: NDArray[np.int32], seat: Seat | None) -> Pulled | None:
        limit_s = self._config.weights.deadline_s + 5
        if seat is not None:
            limit_s += self._config.weights.deadline_s + 10  # a rank that waited in vain says so itself
        try:
            return (await self._all("pull", limit_s, manifest, probe_T, seat, of=[replica]))[0]
        except VerstError as error:
            if not self.refuse(replica, error):
                raise
            return None

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """A publish: its members are settled, and nothing is in flight within, if it has to finish before a version (`weights.in_flight`).

        What comes meanwhile waits. On shared devices the engines are paused by then, and could finish nothing: their groups go on with
        the new version.
        """
        limit_s = 0.0 if self._shared else drain_limit_s(self._config)
        async with self._publishing:
            await asyncio.gather(*(r.ask() for r in self._replicas if r.stage is Stage.READY))
            self._members = [r for r in self._replicas if r.stage in (Stage.READY, Stage.SERVING)]
            busy = self.active  # one that is new has nothing to finish
            try:
                if limit_s:
                    await self._all("drain", limit_s + 5, of=busy)
                try:
                    yield
                finally:
                    if limit_s:
                        await self._all("admit", _CLOSE_S, of=[r for r in busy if r in self._members])
            finally:
                self._members = []

    async def release_memory(self) -> None:
        await self._all("release_memory", self._config.weights.deadline_s)

    async def resume_memory(self) -> None:
        await self._all("resume_memory", self._config.weights.deadline_s)

    async def probe_tokens(self, prompt: Prompt) -> NDArray[np.int32]:
        first = self.active[0]
        return await within(first.worker.call("probe_tokens", prompt), self._config.weights.deadline_s, f"{first.name}: probe tokens")

    # ---- a number that changes

    def begin(self, spawn: Callable[[int], Worker]) -> Replica:
        """A new replica, whose process `spawn` starts; `make_ready` is what follows."""
        number = next(self._numbers)
        replica = Replica(number, spawn(number), Stage.STARTING)
        self._replicas.append(replica)
        return replica

    async def make_ready(self, replica: Replica) -> None:
        """Starts a new replica's engine. From then on it waits for the next publish. Raises what the start raised."""
        self._require_routes(await self._start(replica))
        replica.stage = Stage.READY

    def welcome(self, replica: Replica, version: int) -> None:
        """It holds the version that is published: a new one is given groups from here on."""
        if replica.stage is Stage.READY:
            replica.stage, replica.first_version = Stage.SERVING, version
            replica.changed.set()

    def refuse(self, replica: Replica, error: VerstError) -> bool:
        """Takes a replica out of the publish in progress. False for one that serves: its failures are the run's.

        One that leaves is ended then, without the groups that it has: its engine stays paused.
        """
        if replica.stage is Stage.SERVING:
            return False
        replica.refuse(error)
        self._members = [member for member in self._members if member is not replica]
        return True

    def refuse_new(self, error: VerstError) -> None:
        """The same for all that do not serve: where it cannot be known who failed, those who were there before go on without them."""
        for replica in self.members:
            self.refuse(replica, error)

    async def end(self, replica: Replica) -> None:
        """Ends a replica that has nothing in flight, with its process, which gives its GPU back. Waits for the publish that it is part of.

        Raises what its end raised; it is gone all the same.
        """
        async with self._publishing:  # which has deadlines of its own
            self._replicas.remove(replica)
        try:
            await self._all("close", _CLOSE_S, of=[replica])
        finally:
            replica.worker.kill()

    async def close(self) -> None:
        """Ends every replica in order, also one that is starting or leaving, then its process."""
        try:
            await self._all("close", _CLOSE_S, of=self._replicas)
        finally:
            for replica in self._replicas:
                replica.worker.kill()
