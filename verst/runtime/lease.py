"""The exclusive device lease: trainer and replicas that share GPUs use them in turn, each with all of the memory.

    turn        begins with                         ends with                         the other side has given up
    training    the loading of a batch              its commit and checkpoint         keys, values and weights
    rolling     the transfer of a version           the loading of the next batch     everything, once the weights were read

Where every process has a device of its own, each side always has its turn: nothing is asked of anyone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from verst.config.schema import Config
from verst.observe.spans import Spans
from verst.runtime.limits import turn_limit_s
from verst.runtime.pools import Replicas
from verst.runtime.starting import Starting
from verst.runtime.trainers import Trainers, TrainersLost
from verst.runtime.wait import gather_named, within


class Lease:
    """`shared`: trainer and replicas are on the same devices."""

    def __init__(self, config: Config, trainers: Trainers, replicas: Replicas, *, shared: bool) -> None:
        self._trainers, self._replicas, self._shared = trainers, replicas, shared
        self._turn = asyncio.Lock()
        self._trainers_have_it = True
        self._training = False  # inside `training`
        self._turn_s = turn_limit_s(config)
        self.hand_over_s = 3 * config.train.deadline_s if shared else 0.0
        """Limit of what comes to the pull of a version where devices are shared."""

    async def start(self, scores: bool, starting: Starting, *, again: bool = False) -> None:
        """Starts both sides: together, or one after the other where devices are shared. Then it is the trainers' turn.

        `again`: trainer ranks may live that an earlier loop has started. `starting` sees to what is lost meanwhile.
        """
        if not self._shared:
            await gather_named({"trainers": starting.trainers(again=again), "replicas": self._replicas.start(scores, starting)})
            return
        await starting.trainers(again=False)
        await starting.surviving(lambda: self._trainers.release_memory(weights=True))
        await self._replicas.start(scores, starting)
        await self._replicas.release_memory()
        await starting.surviving(self._trainers.resume_memory)

    @asynccontextmanager
    async def training(self, spans: Spans, then: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
        """The trainers' turn. `then` is awaited after it where devices are shared: a hand-over in which nobody could go on anyway.

        What the hand-overs take is the phase "lease".
        """
        if not self._shared:
            yield
            return
        with spans("lease"):
            await within(self._turn.acquire(), self._turn_s, "the replicas to end their turn on the shared devices")
        try:
            self._training = True
            with spans("lease"), suppress(TrainersLost):  # whoever needs them finds that out, and can bring them back: it is their turn
                await self._give_to_trainers()
            yield
        finally:
            self._training = False
            self._turn.release()
        if then is not None:
            with spans("lease"):
                await then()

    @asynccontextmanager
    async def reviving(self) -> AsyncIterator[None]:
        """The trainers' turn, for trainers that were lost, whoever's turn it is: they have to build everything anew."""
        if not self._shared or self._training:
            yield
            return
        await within(self._turn.acquire(), self._turn_s, "the replicas to end their turn on the shared devices")
        try:
            await self._replicas.release_memory()
            self._trainers_have_it = True
            yield
        finally:
            self._turn.release()

    @asynccontextmanager
    async def transfer(self, *, reads_trainers: bool, again: bool = False) -> AsyncIterator[None]:
        """Around the transfer of a version, after which it is the replicas' turn. `reads_trainers`: it needs the trainers' weights.

        `again`: the version was brought to others before, and the trainers have given up its weights.
        """
        if not self._shared:
            yield
            return
        await within(self._turn.acquire(), self._turn_s, "the trainers to end their turn on the shared devices")
        try:
            if again:
                await self._give_to_trainers()
            self._trainers_have_it = False
            await self._trainers.release_memory(weights=not reads_trainers)
            await self._replicas.resume_memory()
            yield
            if reads_trainers:
                await self._trainers.release_memory(weights=True)
        finally:
            self._turn.release()

    async def _give_to_trainers(self) -> None:
        if not self._trainers_have_it:
            await self._replicas.release_memory()
            self._trainers_have_it = True
            await self._trainers.resume_memory()
