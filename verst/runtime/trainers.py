"""All trainer ranks as one: who is called, for how long we wait, and what becomes of those who outlive another.

A rank that died, or that does not answer by a limit, takes the step in progress with it: the others cannot go on without it. They leave
the collective that they are in, give up what they had built, and build it anew with a replacement, in the same processes. What all of them
then load is the caller's affair (`verst.runtime.snapshots`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import CheckpointError, CollectiveFailed, CorruptWeights, DeviceFailed, VerstError
from verst.journal.codec import encode_batch, encode_routes
from verst.observe.metrics import Tally, merged
from verst.observe.outliers import LAYER_US, slowest
from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.batching import routes_for
from verst.runtime.overdue import Overdue
from verst.runtime.trainer_worker import Published, Scores, TrainerFacts
from verst.runtime.wait import GRACE_S, NoAnswer, gather_named, within
from verst.types import Batch, Estimates, Manifest, RoutedExperts, RoutesWanted

if TYPE_CHECKING:
    from verst.training.checkpoints import FileRecord
    from verst.weights.group import GroupAddress

_CLOSE_S = 30.0
"""Limit of ending a part, whose processes have nothing left to do."""

_ANSWER_S = 5.0
"""Within which a process answers, whatever it does."""


class TrainersLost(VerstError):
    """Trainer ranks died, do not answer, lost one another, or hold weights that changed by themselves.

    Nothing was committed, and computing may begin again after `rebuild`.
    """


@contextlib.contextmanager
def _loss_of(worker: Worker) -> Iterator[None]:
    """What tells that a rank is lost, has lost the others, or must not be trained as it is, becomes `TrainersLost`."""
    try:
        yield
    except (WorkerDied, NoAnswer, CollectiveFailed, CorruptWeights) as error:
        raise TrainersLost(str(error)) from error
    except DeviceFailed as error:
        worker.kill()  # it answers, but computes nothing more
        raise TrainersLost(str(error)) from error


class Trainers:
    """Every rank of the trainer, called together."""

    def __init__(
        self,
        spawn: Callable[[int], Worker],
        config: Config,
        put: Callable[[Any], Any],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`spawn` starts the process of a rank; `put` makes an object cheap to hand to all of them; `tell` takes lines for a person."""
        self._spawn = spawn
        self._tell = tell
        self._overdue = Overdue(tell)
        self._paces: list[Tally] = []  # of each rank in this step
        self._workers = [spawn(rank) for rank in range(config.train.ranks)]
        self._deadline_s = config.train.deadline_s
        self._put = put
        self._config = config
        self._wanted: list[RoutesWanted | None] = []
        self.num_updates = 0
        self.routed_experts: RoutedExperts | None = None
        """How the model routes, if recorded routes are needed."""

    @property
    def ranks(self) -> int:
        return len(self._workers)

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers)

    async def _all(self, method: str, *args: Any, deadline_s: float | None = None, grace_s: float | None = None) -> list[Any]:
        return await self._each(method, [args] * len(self._workers), deadline_s=deadline_s, grace_s=grace_s)

    async def _each(
        self, method: str, args: Sequence[tuple[Any, ...]], *, deadline_s: float | None = None, grace_s: float | None = None
    ) -> list[Any]:
        """As `_all`, with arguments of its own for each rank."""
        limit = deadline_s or self._deadline_s
        calls = {f"{w.name}: {method}": self._call(w, method, own, limit) for w, own in zip(self._workers, args, strict=True)}
        async with self._overdue.watching(method, self._workers):
            return await gather_named(calls, grace_s=grace_s or GRACE_S)

    async def _first(self, method: str, *args: Any) -> Any:
        """Of rank 0 alone."""
        return await self._call(self._workers[0], method, args, self._deadline_s)

    async def _call(self, worker: Worker, method: str, args: Sequence[Any], limit_s: float) -> Any:
        """What one rank answers. Raises `TrainersLost` if it cannot, or if it has lost the others."""
        with _loss_of(worker):
            return await within(worker.call(method, *args), limit_s, f"{worker.name}: {method}")

    async def start(self) -> None:
        """Lets all ranks load the model and meet. Raises what one of them raised.

        Once all processes run: one that Ray wanted to start on a machine that has just been lost would leave the others in the meeting.
        """
        await gather_named({f"{worker.name}: its process": self._runs(worker) for worker in self._workers})
        rendezvous = None
        if len(self._workers) > 1:
            rendezvous = await self._first("rendezvous")
        facts: list[TrainerFacts] = await self._all("start", rendezvous)
        self.num_updates = facts[0].num_updates
        self._wanted = [found.routes_wanted for found in facts]
        self.routed_experts = facts[0].routed_experts if any(self._wanted) else None

    async def rebuild(self) -> list[str]:
        """After `TrainersLost`: every rank has loaded the model and met the others again; nothing of its training state is left.

        Ranks that are dead, do not answer or do not return from what they do are ended and replaced, those who remain keep their processes.
        Returns the names of those who were replaced. Raises `TrainersLost` if another one was lost meanwhile.
        """
        lost = await self._silent("ping", _ANSWER_S)
        self._end(lost)  # before the others are waited for: it is what frees those who are in a collective with them
        left = [rank for rank in range(len(self._workers)) if rank not in lost]
        await self._silent("abandon", _ANSWER_S, left)
        stuck = await self._silent("leave", GRACE_S, left)
        self._end(stuck)
        replaced = sorted((*lost, *stuck))
        for rank in replaced:
            self._workers[rank] = self._spawn(rank)
        await self.start()
        return [self._workers[rank].name for rank in replaced]

    async def nodes(self) -> list[str]:
        """The machine of each rank, by Ray's name for it."""
        return await gather_named({f"{worker.name}: node": self._node(worker) for worker in self._workers})

    async def _node(self, worker: Worker) -> str:
        with _loss_of(worker):
            return await within(worker.node(), self._deadline_s, f"{worker.name}: node")

    async def _runs(self, worker: Worker) -> None:
        with _loss_of(worker):
            await within(worker.where(), self._deadline_s, f"{worker.name}: its process to run")

    async def _silent(self, method: str, limit_s: float, ranks: Sequence[int] | None = None) -> list[int]:
        """Those of the ranks (default: all) who do not do it in time, or cannot."""
        asked = list(range(len(self._workers)) if ranks is None else ranks)
        calls = (within(self._workers[rank].call(method), limit_s, f"{self._workers[rank].name}: {method}") for rank in asked)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [rank for rank, answer in zip(asked, answers, strict=True) if isinstance(answer, Exception)]

    def _end(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._workers[rank].kill()

    async def load_batch(self, batch: Batch) -> Scores:
        """Hands every rank the batch, through the object store, with the routes that it needs, and merges what they learned from it."""
        encoded = self._put(encode_batch(batch))
        routes = self._routes(batch)
        scores = await self._each("load_batch", [(encoded, routes.get(wanted)) for wanted in self._wanted])
        kl = {i: kl for s in scores for i, kl in s.reference_kl.items()}
        return Scores(merged(s.tally for s in scores), kl, {i: values for s in scores for i, values in s.values.items()})

    def _routes(self, batch: Batch) -> dict[RoutesWanted | None, Any]:
        """For each different want: the routes of the samples and layers in it, encoded and in the object store."""
        found: dict[RoutesWanted | None, Any] = {}
        for wanted in self._wanted:
            if wanted is None or wanted in found:
                continue
            found[wanted] = self._put(encode_routes(routes_for(batch, wanted, self._config)))
        return found

    async def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[NDArray[np.float32]] = ()) -> Tally:
        """The last one of a step tells which rank was the slowest, and how much."""
        told = (self._put(advantages), self._put(returns)) if returns else (advantages, returns)  # of every token, or of every sample
        tallies = await self._all("forward_backward", update, *told)
        if update == 0:
            self._paces = [Tally() for _ in tallies]
        reports = [pace.merge(tally).report() for pace, tally in zip(self._paces, tallies, strict=True)]
        paces = {rank: report[LAYER_US] for rank, report in enumerate(reports) if LAYER_US in report}
        tally, found = merged(tallies), slowest(paces)
        if found is not None and update == self.num_updates - 1:
            tally.peak("train/straggler_ratio", found[0])
            tally.peak("train/straggler", found[1])
        return tally

    async def optimizer_step(self, update: int) -> Tally:
        """Only called once every rank finished its backward pass: all ranks step, or none."""
        tally = merged(await self._all("optimizer_step", update))
        for line in tally.notes:
            self._tell(line)
        return tally

    async def publish(self, version: int, location: str | None, probe_T: NDArray[np.int32]) -> Published:
        return (await self._all("publish", version, location, probe_T))[0]

    async def host_group(self, name: str, world: int, *, shared: bool) -> GroupAddress:
        return await self._first("host_group", name, world, shared)

    async def send(self, manifest: Manifest, probe_T: NDArray[np.int32], address: GroupAddress | None = None) -> NDArray[np.float32]:
        """Sends a version, by a group that is formed first if an address is given; returns the trainer's log-probabilities of the probe."""
        return (await self._all("send", manifest, probe_T, address))[0]

    async def call_off(self, group: str, version: int) -> None:
        """Ends what waits in `send` for receivers that have failed, which raises `DeadlineExceeded` then."""
        await self._first("call_off", group, version)

    async def release_memory(self, *, weights: bool) -> None:
        await self._all("release_memory", weights)

    async def resume_memory(self) -> None:
        await self._all("resume_memory")

    async def snapshot(self, directories: Sequence[str], step: int) -> dict[str, Any]:
        """Every rank copies its state and begins to write it into its directory. Returns the model's fingerprint."""
        return (await self._each("snapshot", [(directory, step) for directory in directories]))[0]

    async def written(self, directories: Sequence[str]) -> list[FileRecord]:
        """Waits until every rank's file is there, or could not be written. Raises `CheckpointError`.

        No rank waits for another here, and what one of them still writes must not be removed under it: so no grace ends the wait.
        """
        try:
            return await self._each("written", [(directory,) for directory in directories], grace_s=self._deadline_s)
        except OSError as error:
            raise CheckpointError(f"a trainer rank could not write its checkpoint file: {error}") from error

    async def restore(self, directory: str, step: int) -> None:
        await self._all("restore", directory, step)

    async def restore_snapshot(self, directories: Sequence[str], step: int) -> None:
        await self._each("restore_snapshot", [(directory, step) for directory in directories])

    async def export(self, directory: str) -> None:
        await self._all("export", directory)

    async def close(self) -> None:
        """Ends every rank in order, then its process: one that a collective holds cannot answer."""
        try:
            await self._all("close", deadline_s=_CLOSE_S)
        finally:
            for worker in self._workers:
                worker.kill()
