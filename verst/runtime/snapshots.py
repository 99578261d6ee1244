"""Snapshots of all trainer ranks in the memory of their machines: what brings a lost rank back without the disk.

    rank         copies its state, after a commit, and writes it into shared memory beside its work
    holder       one for each rank, on its machine: says what is complete, and keeps it when the rank's process dies
    buddy        the holder of a rank on another machine, if there is one, has a copy: for the case that the machine is lost

A step can be restored if the snapshots of all ranks are complete; two generations are kept. They are taken as often as a share of the time
allows (`SHARE`): a large model is restored to an older step, and the journaled steps since then are trained again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from verst.config.schema import Config
from verst.errors import CheckpointError, VerstError, first_line
from verst.runtime.actors import Worker, WorkerDied
from verst.runtime.replica import ANSWER_S
from verst.runtime.trainers import Trainers, TrainersLost
from verst.runtime.training_step import weights_digest
from verst.runtime.wait import NoAnswer, within
from verst.training.checkpoints import FileRecord, rank_name
from verst.training.snapshots import snapshot_directory

T = TypeVar("T")

SHARE = 0.03
"""Of the time between two snapshots that taking one may cost."""

_HOLDER_S = 30.0
"""Limit of what a holder does at once."""
_COPY_BYTES_PER_S = 20e6
"""Much slower than any network between machines that train together."""


class Snapshots:
    """Of one run. `spawn(rank, node)` starts the process of a holder."""

    def __init__(
        self, config: Config, run_id: str, trainers: Trainers, spawn: Callable[[int, str], Worker], note: Callable[[str], None]
    ) -> None:
        ranks = range(config.train.ranks)
        self._trainers, self._spawn, self._note = trainers, spawn, note
        self._directories = [str(snapshot_directory(run_id, rank)) for rank in ranks]
        self._names = [rank_name(rank, config.train.ranks) for rank in ranks]
        self._limit_s = config.train.deadline_s
        self._on = config.checkpoint.snapshots
        self._holders: list[Worker] = []
        self._nodes: list[str] = []
        self._completing: asyncio.Task[None] | None = None
        self._taken_at = self._cost_s = 0.0
        self._digests: dict[int, str] = {}  # of the weights, as they were committed

    @property
    def workers(self) -> list[Worker]:
        """The holders."""
        return list(self._holders)

    async def start(self) -> None:
        """Starts a holder beside every rank. Without them the run goes on: then only checkpoints bring it back. Raises `TrainersLost`."""
        if not self._on:
            return
        try:
            await self._settle_down()
        except TrainersLost:
            raise
        except VerstError as error:
            self._give_up(f"no holder could be started: {first_line(error)}")

    async def _settle_down(self) -> None:
        """Every rank's machine has a holder of its snapshots."""
        nodes = await self._trainers.nodes()
        for rank, node in enumerate(nodes):
            if rank == len(self._holders):
                self._holders.append(self._spawn(rank, node))
                self._nodes.append(node)
            elif node != self._nodes[rank]:
                await self._let_go(self._holders[rank])
                self._holders[rank], self._nodes[rank] = self._spawn(rank, node), node
            else:
                continue
            await self._ask(rank, "open", limit_s=self._limit_s)

    async def _let_go(self, holder: Worker) -> None:
        """Of a rank that is on another machine now. If its own lives, it gives the memory there back."""
        with suppress(WorkerDied, NoAnswer):
            await within(holder.call("close"), ANSWER_S, f"{holder.name}: close")
        holder.kill()

    def expect(self, digests: Mapping[int, str]) -> None:
        """The weights hashes of steps that were committed before this process began."""
        self._digests.update(digests)

    async def after_commit(self, step: int, digest: str) -> None:
        """Takes a snapshot of the committed state, if one is due and the one before is complete. Raises `TrainersLost`."""
        self._digests[step] = digest
        began = time.monotonic()
        due = self._cost_s <= SHARE * (began - self._taken_at)
        if not (self._on and due) or (self._completing is not None and not self._completing.done()):
            return
        try:
            await self._trainers.snapshot(self._directories, step)
        except CheckpointError as error:
            self._give_up(first_line(error))
            return
        self._taken_at, self._cost_s = began, time.monotonic() - began
        self._completing = asyncio.create_task(self._complete(step))

    async def _complete(self, step: int) -> None:
        """Beside the steps that follow."""
        try:
            records = await self._trainers.written(self._directories)
            room = await asyncio.gather(*(self._ask(rank, "confirm", step, record) for rank, record in enumerate(records)))
            await asyncio.gather(*(self._copy(rank, step, record) for rank, record in enumerate(records)))
        except TrainersLost:
            return  # whoever works with them finds out too
        except (WorkerDied, NoAnswer) as error:  # the next one may be complete again
            self._note(f"warning: the snapshot of step {step} in memory is not complete: {first_line(error)}")
            return
        except VerstError as error:
            self._give_up(first_line(error))
            return
        if not all(room):
            self._give_up("shared memory has no room for another generation")

    async def _copy(self, rank: int, step: int, record: FileRecord) -> None:
        buddy = self._buddy(rank)
        if buddy is not None:
            await self._ask(buddy, "fetch", self._holders[rank], step, record, limit_s=_HOLDER_S + record.nbytes / _COPY_BYTES_PER_S)

    def _buddy(self, rank: int) -> int | None:
        """The next rank on another machine."""
        ranks = len(self._nodes)
        others = [(rank + i) % ranks for i in range(1, ranks)]
        return next((other for other in others if self._nodes[other] != self._nodes[rank]), None)

    async def restore(self, at_most: int, newer_than: int = -1) -> int | None:
        """Every rank, rebuilt and without a training state, takes the newest complete one up to that step. Returns the step.

        None if there is none, or none newer than that. Raises `TrainersLost`.
        """
        if self._completing is not None:
            await asyncio.wait({self._completing}, timeout=self._limit_s)
        if not self._on:
            return None
        try:
            return await self._restore(at_most, newer_than)
        except TrainersLost:
            raise
        except VerstError as error:
            self._note(f"warning: snapshots cannot be restored: {first_line(error)}")
            return None

    async def _restore(self, at_most: int, newer_than: int) -> int | None:
        await self._settle_down()
        held: list[dict[str, list[int]]] = [await self._ask(rank, "steps") for rank in range(len(self._holders))]
        for step in self._complete_on_all(held):
            if step > at_most:
                continue
            if step <= newer_than:
                break
            try:
                for rank, name in enumerate(self._names):
                    if step not in held[rank].get(name, ()):
                        lender = next(other for other, found in enumerate(held) if step in found.get(name, ()))
                        await self._bring_back(rank, lender, step)
                await self._trainers.restore_snapshot(self._directories, step)
                await self._require_committed(step)
            except CheckpointError as error:
                self._note(f"warning: snapshot of step {step} skipped: {first_line(error)}")
            else:
                return step
        return None

    async def _require_committed(self, step: int) -> None:
        """Raises `CheckpointError` if the weights are not those of the commit: they had changed before the snapshot was taken."""
        digest = await weights_digest(self._trainers, step)
        if digest != self._digests.get(step, digest):
            raise CheckpointError(f"its weights hash is {digest}, not {self._digests[step]} as committed")

    def _complete_on_all(self, held: Sequence[Mapping[str, Sequence[int]]]) -> list[int]:
        """Steps that every rank can have, from its own holder or from another that has a copy, the newest first.

        Whoever has it: which machine a lost rank was on, and who its buddy was, a loop that has just started does not know.
        """
        return sorted(set.intersection(*({step for found in held for step in found.get(name, ())} for name in self._names)), reverse=True)

    async def _bring_back(self, rank: int, lender: int, step: int) -> None:
        """From the holder of another rank."""
        record: FileRecord = await self._ask(lender, "record", step, self._names[rank])
        limit_s = _HOLDER_S + record.nbytes / _COPY_BYTES_PER_S
        await self._ask(rank, "fetch", self._holders[lender], step, record, limit_s=limit_s)

    async def _ask(self, rank: int, method: str, *args: Any, limit_s: float = _HOLDER_S) -> Any:
        """What a holder answers. One that is dead, or does not answer, is replaced by another, which finds what it has left."""
        try:
            return await self._ask_once(rank, method, *args, limit_s=limit_s)
        except (WorkerDied, NoAnswer) as error:
            self._note(f"{first_line(error)}: another snapshot holder takes its place")
            self._holders[rank].kill()
            self._holders[rank] = self._spawn(rank, self._nodes[rank])
            await self._ask_once(rank, "open", limit_s=self._limit_s)  # it is to start first
            return await self._ask_once(rank, method, *args, limit_s=limit_s)

    async def _ask_once(self, rank: int, method: str, *args: Any, limit_s: float = _HOLDER_S) -> Any:
        holder = self._holders[rank]
        return await within(holder.call(method, *args), limit_s, f"{holder.name}: {method}")

    def _give_up(self, reason: str) -> None:
        self._on = False
        self._note(f"warning: no more snapshots in memory, a lost trainer rank is restored from the last checkpoint on disk: {reason}")

    async def close(self) -> None:
        """Gives the memory back."""
        if self._completing is not None:
            self._completing.cancel()
            await asyncio.wait({self._completing})
        for rank in range(len(self._holders)):
            try:
                await self._ask(rank, "open")  # one that was replaced may not have taken charge of what it is to remove
                await self._ask_once(rank, "close")
            except VerstError as error:  # what it has left is found and removed by the next run on that machine
                self._note(f"while closing: {first_line(error)}")
            self._holders[rank].kill()
