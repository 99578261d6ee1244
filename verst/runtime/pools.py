"""All replicas as one: who is called, and for how long we wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.config.evaluated import samples_of
from verst.config.schema import Config
from verst.errors import ConfigError, DeadlineExceeded, EngineFailure, VerstError, WeightMismatch
from verst.journal.codec import decode_group, encode_group
from verst.observe.timeline import Timeline
from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.batching import given_up
from verst.runtime.limits import REPLACEMENTS, drain_limit_s, evaluated_trajectories, group_deadline_s, replacement_limit_s, step_wait_s
from verst.runtime.replica import Replacing, Replica, Stage
from verst.runtime.rollout_worker import Pulled, Seat
from verst.runtime.salvage import Salvage
from verst.runtime.trainer_worker import GROUP
from verst.runtime.wait import GRACE_S, explained_by, gather_named, outcomes, within
from verst.types import Group, Manifest, Prompt, RoutedExperts

_CLOSE_S = 30.0
"""Limit of ending a part, whose processes have nothing left to do."""

_ASK_S = 2.0
"""How long a replica may take to say what its groups wait for, when a run tells why it ends."""


LOSSES = (WorkerDied, EngineFailure, DeadlineExceeded, WeightMismatch)
"""What tells that a replica is lost."""


class Replicas:
    """Every rollout replica. Groups go to the one with the fewest in flight; new weights go to all.

    Their number may change while the run goes on (`verst.runtime.scaler`). A publish has the members that were there as it began; one that
    is new among them is given groups once it holds that version, and one that fails until then is refused and ends nothing.

    One whose process dies, whose engine breaks or who does not answer is lost: its groups are rolled again by others, with the same numbers
    and seeds and from the tokens that are kept of them (`salvage`), and it is replaced (`verst.runtime.replacer`). Without any other,
    groups wait for the replacement.
    """

    def __init__(self, replicas: Sequence[Replica], config: Config, *, shared: bool = False, timeline: Timeline | None = None) -> None:
        """`replicas`: those that the run begins with."""
        self._replicas = list(replicas)
        self._numbers = itertools.count(max((replica.number for replica in replicas), default=-1) + 1)
        self._members: list[Replica] = []
        self._publishing = asyncio.Lock()
        self._changed = asyncio.Event()  # set as replicas become ready, or serve
        self._lost: asyncio.Queue[Replica] = asyncio.Queue()
        self.salvage = Salvage(lambda: self._replicas)
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
    def coming(self) -> int:
        """How many are new and do not serve yet."""
        return sum(replica.stage in (Stage.STARTING, Stage.READY) for replica in self._replicas)

    @property
    def workers(self) -> list[Worker]:
        """Of all, whatever their stage."""
        return [replica.worker for replica in self._replicas]

    @property
    def members(self) -> Sequence[Replica]:
        """Those that take part in the publish in progress."""
        return tuple(self._members)

    async def _all(self, method: str, deadline_s: float, *args: Any, of: Sequence[Replica] | None = None) -> list[Any]:
        """By default: of those that serve."""
        chosen = self.active if of is None else of
        return await gather_named({(who := f"{r.name}: {method}"): within(r.worker.call(method, *args), deadline_s, who) for r in chosen})

    async def start(self, scores: bool, starting: Replacing) -> None:
        """Starts those that the run begins with."""
        self._scores = scores
        self._routed_experts = (await gather_named({f"{r.name}: start": starting.replica(r, self._start) for r in self._replicas}))[0]

    async def _start(self, replica: Replica) -> RoutedExperts | None:
        """Returns what its engine records of its routes."""
        method, args = ("routed_experts", ()) if replica.started else ("start", (self._scores,))
        (recorded,) = await self._all(method, self._config.train.deadline_s, *args, of=[replica])
        (replica.weight_ranks,) = await self._all("weight_ranks", self._config.weights.deadline_s, of=[replica])
        replica.started = True
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
        trajectories = groups * self._config.rolled_per_group + evaluated_trajectories(self._config)
        return group_deadline_s(self._config, trajectories, shared=self._shared)

    def _trajectories(self, replica: Replica) -> int:
        """In flight on it, cut ones included."""
        return (replica.in_flight - replica.evaluating) * self._config.rolled_per_group + replica.samples

    @property
    def step_wait_s(self) -> float:
        """Limit of a step's wait for the next group."""
        return step_wait_s(self._config, shared=self._shared)

    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """One group, rolled and scored by the least busy replica: encoded, for the journal, and decoded.

        One that does not come back in time has failed, and is taken back from its replica. That is the last resort: rolling and scoring
        have limits of their own. One whose replica is lost, or does not finish it after it was told to leave, is rolled again by another.
        Raises what a replica was lost by if that is the last of `REPLACEMENTS` of this group.
        """
        samples, losses = samples_of(self._config, how), 0
        while True:
            replica = await self._chosen(how)
            replica.began_one(samples)
            self._rolling[seq] = replica, time.monotonic()
            demonstrated = how == "demonstrations"  # which keeps no replica busy
            try:
                with nullcontext([]) if demonstrated else self._timeline.group(seq, prompt.id, replica.number) as became:
                    encoded, group = await self._rolled(replica, seq, prompt, how)
                    became.append(group)
            except VerstError as error:
                if not self._left(replica, error):
                    raise
                losses += replica.stage is Stage.LOST
                if losses == REPLACEMENTS:
                    kind = DeadlineExceeded if isinstance(error, DeadlineExceeded) else EngineFailure
                    raise kind(f"group {seq} ({prompt.id}) was on {losses} replicas that were lost; the last: {error}") from error
                replica.rolled_again.append(seq)
            else:
                del self._rolling[seq]  # not after an error, which ends the run: then it tells where the group was
                self.salvage.end(seq)
                return encoded, group
            finally:
                replica.ended_one(samples)

    async def _chosen(self, how: str) -> Replica:
        """The least busy of those that serve. If there is none, the first that does again."""

        def usable() -> list[Replica]:
            new = [r for r in self._replicas if r.stage is Stage.READY] if how == "demonstrations" else []  # which need no weights
            return self.active + new

        if not usable():
            await within(self._until(lambda: bool(usable())), replacement_limit_s(self._config), "a replica to serve")
        return min(usable(), key=self._trajectories)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _left(self, replica: Replica, error: VerstError) -> bool:
        """Whether others roll what a replica could not: it leaves, or it is lost, which the error may be the first sign of."""
        if replica.stage is Stage.SERVING and isinstance(error, LOSSES):
            self.lose(replica, error)
        return replica.stage in (Stage.LEAVING, Stage.LOST)

    async def _rolled(self, replica: Replica, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        """What one replica makes of a group, or a failed one."""
        finished, limit_s = replica.finished, self.deadline_s(replica.in_flight - replica.evaluating)
        rolling = asyncio.ensure_future(replica.worker.post("roll", seq, prompt, how, self.salvage.begin(seq, replica)))
        lost = asyncio.ensure_future(replica.gone.wait())
        try:
            await asyncio.wait({rolling, lost}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if replica.error is not None and replica.stage is Stage.LOST:
                raise replica.error
            awaited = "" if rolling.done() else (await self._standing(replica))[seq][0]  # asked before it is taken back
            if rolling.done():
                encoded = await rolling
                replica.finished += 1
                return encoded, decode_group(encoded)
        finally:
            rolling.cancel()
            lost.cancel()
        reason = f"waited {limit_s:g} s for {awaited}"
        if replica.finished == finished or replica.stage is Stage.LEAVING:
            raise DeadlineExceeded(f"{reason}: group {seq} ({prompt.id}), and no other came back from {replica.name} meanwhile")
        group = given_up(seq, prompt, samples_of(self._config, how) or (self._config.rollout.group_size if how == "policy" else 1), reason)
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
    ) -> dict[Replica, Pulled | VerstError]:
        """Every member loads and verifies one version, serves it and scores the probe, or says why it did not.

        `seats`: their places in a weight group that is formed first. In a group, the failure of one holds up the others.
        """
        seats = seats or {}
        members = self.members
        calls = {f"{r.name}: pull": self._pull(r, manifest, probe_T, seats.get(r)) for r in members}
        pulled = await outcomes(calls, grace_s=GRACE_S if manifest.location == GROUP else None)
        return dict(zip(members, pulled, strict=True))

    async def _pull(self, replica: Replica, manifest: Manifest, probe_T: NDArray[np.int32], seat: Seat | None) -> Pulled:
        limit_s = self._config.weights.deadline_s + 5
        if seat is not None:
            limit_s += self._config.weights.deadline_s + 10  # a rank that waited in vain says so itself
        return (await self._all("pull", limit_s, manifest, probe_T, seat, of=[replica]))[0]

    async def sort_out(self, failed: Mapping[Replica, VerstError], *, last: bool) -> bool:
        """Those who did not take a version: who is dead leaves the publish in progress; on the `last` attempt all of them do.

        Returns whether any left. One that lives may have failed because of another. Raises what is no sign of a loss.
        """
        before = self.members
        for replica, error in failed.items():
            if replica.stage is Stage.SERVING and not isinstance(error, LOSSES):
                raise error
        found = await asyncio.gather(*(replica.answers() for replica in failed))
        for (replica, error), dead in zip(failed.items(), found, strict=True):
            if dead is not None or last:
                self.drop(replica, error)
        return self.members != before

    @asynccontextmanager
    async def drained(self, *, newcomers: bool = False) -> AsyncIterator[None]:
        """A publish: its members are settled, and nothing is in flight within, if it has to finish before a version (`weights.in_flight`).

        What comes meanwhile waits. On shared devices the engines are paused by then, and could finish nothing: their groups go on with
        the new version. `newcomers`: only those that do not serve yet are members.
        """
        limit_s = 0.0 if self._shared else drain_limit_s(self._config)
        async with self._publishing:
            await asyncio.gather(*(r.ask() for r in self._replicas if r.stage is Stage.READY))
            stages = (Stage.READY,) if newcomers else (Stage.READY, Stage.SERVING)
            self._members = [r for r in self._replicas if r.stage in stages]
            busy = [] if newcomers else self.active  # one that is new has nothing to finish
            try:
                if limit_s:
                    await self._each("drain", limit_s + 5, of=busy)
                try:
                    yield
                finally:
                    if limit_s:
                        await self._each("admit", _CLOSE_S, of=[r for r in busy if r in self._members])
            finally:
                self._members = []

    async def _each(self, method: str, deadline_s: float, of: Sequence[Replica]) -> None:
        """Without those that are lost over it."""
        asked = [replica for replica in of if replica.stage is not Stage.LOST]
        answers = await outcomes({(who := f"{r.name}: {method}"): within(r.worker.call(method), deadline_s, who) for r in asked})
        for replica, answer in zip(asked, answers, strict=True):
            if isinstance(answer, LOSSES):
                self.drop(replica, answer)
            elif isinstance(answer, VerstError):
                raise answer

    async def release_memory(self) -> None:
        await self._each("release_memory", self._config.weights.deadline_s, of=self._with_engines)

    async def resume_memory(self) -> None:
        await self._each("resume_memory", self._config.weights.deadline_s, of=self._with_engines)

    @property
    def _with_engines(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.stage in (Stage.READY, Stage.SERVING)]

    async def probe_tokens(self, prompt: Prompt, starting: Replacing) -> NDArray[np.int32]:
        """Of one that has started; of another in its place if it has died since."""
        return await starting.replica(self.active[0], lambda replica: self._probed(replica, prompt))

    async def _probed(self, replica: Replica, prompt: Prompt) -> NDArray[np.int32]:
        await self._start(replica)
        return (await self._all("probe_tokens", self._config.weights.deadline_s, prompt, of=[replica]))[0]

    # ---- a number that changes

    def begin(self, spawn: Callable[[int, int], Worker], instead_of: Replica | None = None) -> Replica:
        """A new replica, whose process `spawn` starts by its number and slot; `make_ready` is what follows."""
        number = next(self._numbers)
        slot = number if instead_of is None else instead_of.slot
        replica = Replica(number, spawn(number, slot), Stage.STARTING, slot)
        self._replicas.append(replica)
        return replica

    def begin_with(self, spawn: Callable[[int, int], Worker], lost: Replica) -> Replica:
        """While the run starts: a new one in place of one whose process has died. It serves from the run's first publish on."""
        self._replicas.remove(lost)
        lost.worker.kill()
        replica = self.begin(spawn, lost)
        replica.stage = Stage.SERVING
        return replica

    async def make_ready(self, replica: Replica) -> None:
        """Starts a new replica's engine. From then on it waits for a version. Raises what the start raised."""
        self._require_routes(await self._start(replica))
        replica.stage = Stage.READY
        self._changed.set()

    async def newcomers(self) -> None:
        """Returns once there is a replica that waits for a version."""
        await self._until(lambda: any(replica.stage is Stage.READY for replica in self._replicas))

    def welcome(self, replica: Replica, version: int) -> None:
        """It holds the version that is published: a new one is given groups from here on."""
        replica.version = version
        if replica.stage is Stage.READY:
            replica.stage, replica.first_version = Stage.SERVING, version
            replica.changed.set()
            self._changed.set()

    def drop(self, replica: Replica, error: VerstError) -> None:
        """Takes a replica out of the publish in progress: one that is new is refused, one that serves is lost.

        One that leaves is ended then, without the groups that it has: its engine stays paused.
        """
        if replica.stage is Stage.SERVING:
            self.lose(replica, error)
            return
        replica.refuse(error)
        self._members = [member for member in self._members if member is not replica]

    def lose(self, replica: Replica, error: VerstError) -> None:
        """One that serves is lost: its groups go to others, and it is replaced."""
        replica.salvaged = self.salvage.tokens(replica)
        replica.lose(error)
        self._members = [member for member in self._members if member is not replica]
        self._lost.put_nowait(replica)

    async def next_lost(self) -> Replica:
        """Returns when one is lost, each once. It is idle most of the time, so it has no deadline."""
        return await self._lost.get()

    async def bury(self, replica: Replica) -> None:
        """Forgets one that is lost or was refused, with its process. Waits for the publish that it is part of."""
        async with self._publishing:  # which has deadlines of its own
            self._replicas.remove(replica)
        replica.worker.kill()

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
