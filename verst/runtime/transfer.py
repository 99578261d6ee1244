"""How a published version gets from the trainers into the engines.

    file    trainer rank 0 writes it, the engines map it: shared memory, or a disk all can read
    group   trainer rank 0 broadcasts it to the engines, which receive while it sends (`verst.weights.group`)
    shared  trainer rank 0 fills buffers that the engines on its device map (`verst.weights.shared`)

Either way it is verified before it serves, and one that did not arrive whole is brought again whole, once: an engine cannot go back. One
that does not take it then either is replaced.
Right after, trainer and engines score the probe; what engines generate before its verdict is held back by the loop.

A weight group is formed at the first version, and anew at the next one after replicas came or went: within the calls that bring it, so
that neither side can be held up between the meeting and the transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import DeadlineExceeded, TrainingDiverged, VerstError
from verst.observe.intervals import Interval
from verst.runtime.limits import replacement_limit_s
from verst.runtime.placement import Placement
from verst.runtime.pools import Replicas
from verst.runtime.replica import Replica, Stage
from verst.runtime.rollout_worker import Pulled, Seat
from verst.runtime.trainer_worker import GROUP, Published
from verst.runtime.trainers import Trainers, TrainersLost
from verst.runtime.wait import within
from verst.types import Manifest
from verst.weights.push import check_probe, compare_probe

if TYPE_CHECKING:
    from verst.weights.group import GroupAddress

ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Brought:
    """A version that all replicas serve."""

    difference: float  # largest mean |trainer - engine| of the probe's log-probabilities
    stats: dict[str, float]  # what the engines count, in sum
    during: Interval = (0.0, 0.0)
    """When it was brought, by `time.perf_counter`."""
    sending: Interval | None = None
    """When the trainers sent it. None: they had written it before."""


class Transfer:
    """Between all trainer ranks and all replicas of a run. `location` is the directory of files."""

    def __init__(self, config: Config, placement: Placement, trainers: Trainers, replicas: Replicas, location: str) -> None:
        self._trainers, self._replicas = trainers, replicas
        self._probe_limit = config.probe_limit
        transport = config.weights.transport or _default(placement, config.train.ranks)
        self._by_group, self._shared = transport != "file", transport == "shared"
        self.location = GROUP if self._by_group else location
        self._replacement_s = replacement_limit_s(config)
        self._run_id = ""
        self._place: GroupAddress | None = None
        self._groups = 0
        """Formed so far: each has a name of its own."""
        self._group_name = ""
        """Of the newest one."""
        self._seated: Sequence[Replica] = ()
        """Its members, in order."""

    @property
    def reads_trainers(self) -> bool:
        """Whether the weights are read from the trainers while they are brought, and not from a file written before."""
        return self._by_group

    async def open(self, run_id: str) -> None:
        """Opens the place where weight groups meet, once all parts have started. Raises `DeadlineExceeded`."""
        self._run_id = run_id
        await self.reopen()

    async def reopen(self) -> None:
        """The same, after trainer ranks were replaced: the place was in the process of one of them. Raises `TrainersLost`."""
        self._seated = ()
        if self._by_group:
            self._place = await self._trainers.host_group(f"{self._run_id}/{self._groups}", 1, shared=self._shared)

    async def bring(self, published: Published, probe_T: NDArray[np.int32]) -> Brought:
        """All engines load, verify and serve a version, and agree with the trainer about the tokens of the probe.

        A replica that is new is refused if it fails in this, one that serves is lost, and the others go on; without any other, the version
        waits for a replacement. Raises `TrainersLost`, and `TrainingDiverged` if trainer and engines do not agree.
        """
        began = time.perf_counter()
        while True:
            async with self._replicas.drained():
                brought = await self._brought(published, probe_T, began)
            if brought is not None:
                return brought
            await within(self._replicas.newcomers(), self._replacement_s, "a replica in place of those that were lost")

    async def bring_newcomers(self, published: Published, probe_T: NDArray[np.int32]) -> None:
        """The same, of a version that others serve, to those that have none. What fails is refused. Raises `TrainersLost`."""
        async with self._replicas.drained(newcomers=True):
            await self._brought(published, probe_T, time.perf_counter())

    async def _brought(self, published: Published, probe_T: NDArray[np.int32], began: float) -> Brought | None:
        """To all members, or to none if all of them were lost."""
        pulled, trainer_T, sending = await self._pull(published, probe_T)
        differences = [self._compared(replica, found, trainer_T, published.manifest.version) for replica, found in pulled.items()]
        if not pulled:
            return None
        return Brought(max(differences), _together([found.stats for found in pulled.values()]), (began, time.perf_counter()), sending)

    def _compared(self, replica: Replica, found: Pulled, trainer_T: NDArray[np.float32] | None, version: int) -> float:
        """How far a replica is from the trainer; one that is new serves if that is near enough."""
        assert trainer_T is not None, "who pulled has something to compare with"
        difference = compare_probe(trainer_T, found.probe_T)
        try:
            check_probe(difference, self._probe_limit, version)
        except TrainingDiverged as error:
            if replica.stage is Stage.SERVING:
                raise
            self._replicas.drop(replica, error)
            return 0.0
        self._replicas.welcome(replica, version)
        return difference

    async def _pull(
        self, published: Published, probe_T: NDArray[np.int32]
    ) -> tuple[dict[Replica, Pulled], NDArray[np.float32] | None, Interval | None]:
        """What the replicas report, the trainer's log-probabilities of the probe, and when it sent if it did."""
        attempts = 0
        while self._replicas.members:
            found, trainer_T, sending = await self._attempt(published, probe_T)
            failed = {replica: outcome for replica, outcome in found.items() if isinstance(outcome, VerstError)}
            if not failed and trainer_T is not None:
                return {r: f for r, f in found.items() if isinstance(f, Pulled)}, trainer_T, sending
            self._seated = ()
            attempts += 1
            if await self._replicas.sort_out(failed, last=attempts == ATTEMPTS):
                attempts = 0
        return {}, None, None

    async def _attempt(
        self, published: Published, probe_T: NDArray[np.int32]
    ) -> tuple[dict[Replica, Pulled | VerstError], NDArray[np.float32] | None, Interval | None]:
        """Once. Without the trainer's log-probabilities if what it sent did not reach all members."""
        if published.probe_T is not None:
            return await self._replicas.pull(published.manifest, probe_T), published.probe_T, None
        members = self._replicas.members
        address, seats = (None, {}) if members == self._seated else self._seats(members)
        pulling = asyncio.ensure_future(self._replicas.pull(published.manifest, probe_T, seats))
        sending = asyncio.ensure_future(self._send(published.manifest, probe_T, address))
        try:
            await self._call_off_if_in_vain(sending, pulling, published.manifest.version)
            trainer_T, during = await sending
        except DeadlineExceeded:
            found = await pulling
            if all(isinstance(outcome, Pulled) for outcome in found.values()):
                raise  # it was not theirs
            return found, None, None
        finally:
            sending.cancel()
            await asyncio.wait({pulling})  # what it waits for has limits
        self._seated = members
        return await pulling, trainer_T, during

    async def _call_off_if_in_vain(self, sending: asyncio.Future[Any], pulling: asyncio.Future[dict[Replica, Any]], version: int) -> None:
        """Waits for the one or the other. A sender whose receivers have failed would wait for them until its own limit."""
        await asyncio.wait({sending, pulling}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() or pulling.exception() is not None:
            return
        if any(isinstance(outcome, VerstError) for outcome in pulling.result().values()):
            with contextlib.suppress(TrainersLost):  # who sends is lost too, and says so
                await self._trainers.call_off(self._group_name, version)

    async def _send(
        self, manifest: Manifest, probe_T: NDArray[np.int32], address: GroupAddress | None
    ) -> tuple[NDArray[np.float32], Interval]:
        began = time.perf_counter()
        return await self._trainers.send(manifest, probe_T, address), (began, time.perf_counter())

    def _seats(self, members: Sequence[Replica]) -> tuple[GroupAddress, dict[Replica, Seat]]:
        """The address of a new group, and each replica's places in it; rank 0 is the trainer."""
        assert self._place is not None, "open() comes first"
        *firsts, world = accumulate((replica.weight_ranks for replica in members), initial=1)
        self._groups += 1
        self._group_name = f"{self._run_id}/{self._groups}"
        address = replace(self._place, name=self._group_name, world=world)
        return address, {replica: Seat(address, first) for replica, first in zip(members, firsts, strict=True)}


def _together(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums, of times the largest. A replica that is new may not know all of its figures yet."""
    values: dict[str, list[float]] = {}
    for name, value in (item for found in stats for item in found.items()):
        values.setdefault(name, []).append(value)
    return {name: max(found) if name.startswith("weights_") else sum(found) for name, found in values.items()}


def _default(placement: Placement, ranks: int) -> str:
    """Between GPUs a group; NCCL cannot join two processes on one GPU, which share buffers instead. A file where several are shared."""
    if not placement.trainer_gpus or (placement.shared and ranks > 1):
        return "file"
    return "shared" if placement.shared else "group"
