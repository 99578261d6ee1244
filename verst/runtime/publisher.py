"""Committed versions on their way to the engines: one at a time, and the slots that each of them frees.

    who          takes                  gives              waits for                           unblocked by
    pull         a committed version    freed slots        replicas that verified it           the replicas; a replacement, if all are lost
    consumer     -                      -                  the newest version to be served     pull; what lost the trainers in it
    roll         -                      -                  the newest version to be served     pull, of that version or of a later one

A slot is freed when the engines serve the weights that include its group's gradient, or later ones: what a pull that failed has not freed,
the next one does. A pull that fails because trainer ranks were lost is not an error here: the consumer is told, brings the trainers back,
and publishes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from verst.config.schema import Config
from verst.journal.records import PublishRecord
from verst.runtime.limits import pull_limit_s, recovery_limit_s
from verst.runtime.parts import Parts
from verst.runtime.standing import Standing
from verst.runtime.trainer_worker import Published
from verst.runtime.trainers import TrainersLost
from verst.runtime.wait import within

Free = Callable[[Sequence[int]], Awaitable[None]]


class Publisher:
    """Of one loop. `free` gives back the slots of groups."""

    def __init__(self, config: Config, parts: Parts, standing: Standing, free: Free, version: int) -> None:
        self._parts, self._standing, self._free = parts, standing, free
        self._limit_s = pull_limit_s(config) + parts.lease.hand_over_s
        self._recovery_s = recovery_limit_s(config)
        self._held: list[int] = []  # groups whose gradient is in the version on its way, or in an earlier one that did not arrive
        self._published: Published | None = None
        self._served = asyncio.Event()
        self._served.set()
        self._lost = asyncio.Event()  # set while the pull has failed because the trainers were lost
        self._why: TrainersLost | None = None
        self.version = version
        """The newest, served or on its way."""
        self.served_version = version
        """The newest that all engines serve."""

    @property
    def unserved(self) -> bool:
        """Whether the newest version has not arrived, and is not on its way any more."""
        return self._lost.is_set()

    def begin(self, tasks: asyncio.TaskGroup, published: Published, seqs: Sequence[int]) -> None:
        """Begins to bring a version to the engines. The one before has arrived, or will not."""
        self.version, self._published = published.manifest.version, published
        self._held += seqs
        self._served.clear()
        self._lost.clear()
        tasks.create_task(self._standing.explained(self._pull))

    async def _pull(self) -> None:
        assert self._published is not None, "begin() comes first"
        for seq in self._held:
            self._standing.group(seq, f"the engines to have version {self.version}")
        try:
            if self._published.manifest.location:
                await self._bring(self._published)
        except TrainersLost as error:
            self._why = error
            self._lost.set()
            return
        held, self._held = self._held, []
        await self._free(held)
        self._served.set()

    async def _bring(self, published: Published) -> None:
        """All engines load, verify and serve a version."""
        async with self._parts.lease.transfer(reads_trainers=self._parts.transfer.reads_trainers):
            brought = await self._parts.transfer.bring(published, self._parts.probe_tokens)
        manifest, serving = published.manifest, tuple(replica.number for replica in self._parts.replicas.active)
        self._parts.journal.append_published(PublishRecord(manifest.version, manifest.digest, serving))
        self.served_version = manifest.version
        self._parts.observer.published(manifest.version, brought)

    async def bring_newcomers(self) -> None:
        """Gives the served version to replicas that have started since, while the trainers hold it and do nothing else.

        Raises `TrainersLost`.
        """
        assert self._published is not None, "newcomers() comes first"
        async with self._parts.lease.transfer(reads_trainers=self._parts.transfer.reads_trainers, again=True):
            await self._parts.transfer.bring_newcomers(self._published, self._parts.probe_tokens)

    async def served(self) -> None:
        """Waits until the engines serve the newest version, and its probe was compared. For those who need the trainers.

        Raises `TrainersLost` if it will not arrive before they are back.
        """
        waits = [asyncio.ensure_future(self._served.wait()), asyncio.ensure_future(self._lost.wait())]
        try:
            await within(asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED), self._limit_s, self._awaited)
        finally:
            for wait in waits:
                wait.cancel()
        if self._lost.is_set():
            assert self._why is not None
            raise self._why

    async def newcomers(self) -> None:
        """Returns once there are replicas that `bring_newcomers` is for."""
        while self._published is None or not self._published.manifest.location:
            await asyncio.Event().wait()  # for ever: what is trained does not come from the engines, which take part in the next publish
        await self._parts.replicas.newcomers()

    async def lost(self) -> None:
        """Returns once the newest version cannot arrive before the trainers are back."""
        await self._lost.wait()

    async def held_back(self) -> None:
        """Waits until the engines serve the newest version, whatever happens to the trainers meanwhile. For what came from the engines."""
        await within(self._served.wait(), self._limit_s + self._recovery_s, self._awaited)

    @property
    def _awaited(self) -> str:
        return f"engines to pull version {self.version}"
