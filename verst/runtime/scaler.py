"""Another number of replicas while a run goes on: what is wished for in the run's directory is pursued here, in the loop's process.

    more    a replica's process and engine start beside the run; it serves once the trainers have given it a version
    fewer   those that do not serve yet are ended first; then the least busy get no more groups, finish what they have, and end

Nobody waits for any of it: the loop goes on with the replicas that serve (`verst.runtime.pools.Replicas`). What fails is told, and the run
has those. The number that was reached is recorded in the run's configuration, so that a resumed run begins with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from verst.config.schema import Config
from verst.errors import ConfigError, DeadlineExceeded, VerstError, first_line
from verst.runtime.actors import Worker
from verst.runtime.pools import Replicas
from verst.runtime.replica import Replica, Stage
from verst.runtime.rundir import RunDirectory
from verst.runtime.scale_request import ScaleAnswer, ScaleRequest, State
from verst.runtime.wait import within

_POLL_S = 1.0
_MARGIN_S = 10.0
"""A leaving replica's groups have limits of their own, which expire before."""


@dataclass(frozen=True)
class Means:
    """What a scaler works with: how a replica's process is started, what is refused (`ConfigError`), who is told, which version it is, and
    what follows a change of the run's configuration.
    """

    spawn: Callable[[int, int], Worker]
    check: Callable[[int], None]
    note: Callable[[str], None]
    version: Callable[[], int]
    changed: Callable[[], None]


class Scaler:
    """Of one run. `config` is that of the run, with the number of replicas that it begins with."""

    def __init__(self, run: RunDirectory, config: Config, replicas: Replicas, means: Means) -> None:
        self._run, self._config, self._replicas, self._means = run, config, replicas, means
        self._coming: dict[asyncio.Task[None], Replica] = {}
        self._going: dict[asyncio.Task[str], Replica] = {}
        self._request: ScaleRequest | None = None  # the newest one, until it was answered
        self._seen: str | None = None
        self._lines: list[str] = []
        self._written = 0  # lines in the answer's file

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Pursues what is wished for within. What is under way at the end is given up; the replicas end with the run's."""
        follower = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            for task in (follower, *self._coming, *self._going):
                task.cancel()
            await asyncio.gather(follower, *self._coming, *self._going, return_exceptions=True)
            if self._request is not None:
                self._tell(f"the run has ended with {len(self._replicas.active)} replica(s) that served")
                await self._answer(State.FAILED)

    async def _follow(self) -> None:
        while True:
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - what goes wrong here is not the run's, which has the replicas that serve
                self._tell(f"failed: {_reason(error)}")
                if self._request is not None:
                    await self._answer(State.FAILED)
                await asyncio.sleep(_POLL_S)

    async def _look(self) -> None:
        """For a new wish, and for what came of the one before."""
        request = await asyncio.to_thread(ScaleRequest.read, self._run)
        if request is not None and request.id != self._seen:
            await self._take(request)
        await self._settle()
        if self._request is not None:
            await self._report(self._request)

    async def _take(self, request: ScaleRequest) -> None:
        """Begins with a wish, which takes the place of the one before."""
        self._seen, self._request = request.id, request
        self._lines, self._written = [], 0
        try:
            self._means.check(request.replicas)
        except ConfigError as error:
            self._means.note(f"scale: {request.replicas} replica(s) refused: {error}")
            self._lines = [str(error)]
            await self._answer(State.REFUSED)
            return
        self._tell(f"{len(self._replicas.active)} replica(s) serve, {request.replicas} are wanted")
        self._pursue(request.replicas)

    def _pursue(self, wanted: int) -> None:
        new = [task for task, replica in self._coming.items() if replica.stage in (Stage.STARTING, Stage.READY)]
        missing = wanted - len(self._replicas.active) - self._replicas.coming  # those that replace others included
        for _ in range(missing):
            replica = self._replicas.begin(self._means.spawn)
            self._tell(f"{replica.name} starts")
            self._coming[asyncio.create_task(self._come(replica))] = replica
        for task in new[::-1][: max(0, -missing)]:
            self._coming[task].leave()
            task.cancel()
        least_busy = sorted(self._replicas.active, key=lambda replica: (replica.in_flight, -replica.number))
        for replica in least_busy[: max(0, -missing - len(new))]:
            self._tell(f"{replica.name} is given no more groups; it has {replica.in_flight} in flight")
            replica.leave()
            self._going[asyncio.create_task(self._go(replica, replica.in_flight))] = replica

    async def _come(self, replica: Replica) -> None:
        """Returns when a new replica serves. It waits for a publish as long as the trainer takes, or until the run ends."""
        await self._replicas.make_ready(replica)
        self._tell(f"{replica.name} is ready, and waits for the trainers to give it their weights")
        await replica.changed.wait()
        if replica.error is not None:
            raise replica.error

    async def _go(self, replica: Replica, had: int | None) -> str:
        """Ends a replica once it has nothing in flight, or cannot finish what it has.

        `had`: groups as it was told to leave; None: it never served. Returns what to tell of it.
        """
        limit_s = self._replicas.deadline_s(max(1, replica.most_in_flight)) + _MARGIN_S
        try:
            await within(replica.done.wait(), limit_s, f"the groups that {replica.name} has in flight")
        except DeadlineExceeded as error:
            replica.give_up(error)
        unfinished, by_force = replica.in_flight, ""
        try:
            await self._replicas.end(replica)
        except Exception as error:  # noqa: BLE001 - whatever its end raised, its process is gone
            by_force = f" (by force: {_reason(error)})"
        if replica.in_flight:
            replica.done.clear()
            with contextlib.suppress(DeadlineExceeded):
                await within(replica.done.wait(), _MARGIN_S, f"the calls to {replica.name}, which has ended, to fail")
        return _last_words(replica, had, unfinished) + by_force

    async def _settle(self) -> None:
        """Waits a second, or until something has come or gone, and tells of it."""
        under_way = {*self._coming, *self._going}
        if not under_way:
            await asyncio.sleep(_POLL_S)
            return
        ended, _ = await asyncio.wait(under_way, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            if task in self._coming:
                self._came(task, self._coming.pop(task))
            elif task in self._going:
                self._went(task, self._going.pop(task))
        if ended:
            await self._record()

    def _came(self, task: asyncio.Task[None], replica: Replica) -> None:
        # whatever its start raised is its own: the run did without it so far
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            self._tell(f"{replica.name} serves from version {replica.first_version} on")
            return
        if error is not None:
            self._tell(f"{replica.name} could not {'join' if replica.stage is Stage.REFUSED else 'start'}: {_reason(error)}")
        replica.leave()
        self._going[asyncio.create_task(self._go(replica, None))] = replica

    def _went(self, task: asyncio.Task[str], replica: Replica) -> None:
        error = task.exception()
        self._tell(task.result() if error is None else f"{replica.name} did not end: {_reason(error)}")

    async def _record(self) -> None:
        """The number that serves becomes the one that a resumed run begins with."""
        replacing = max(0, self._replicas.coming - len(self._coming))
        before, now = self._config.rollout.replicas, len(self._replicas.active) + replacing
        if now == before:
            return
        config = self._config.model_copy(update={"rollout": self._config.rollout.model_copy(update={"replicas": now})})
        options = {"rollout.replicas": (before, now)}
        try:
            await asyncio.to_thread(self._run.change, config, options, step=self._means.version())
        except ConfigError as error:
            self._means.note(f"warning: rollout.replicas {before} -> {now} was not recorded: {first_line(error)}")
        else:
            self._config = config
            self._means.changed()

    async def _report(self, request: ScaleRequest) -> None:
        if self._coming or self._going:
            if len(self._lines) > self._written:
                await self._answer(State.UNDER_WAY)
            return
        serving = len(self._replicas.active)
        self._tell(f"{serving} replica(s) serve" + ("" if serving == request.replicas else f", {request.replicas} were wanted"))
        await self._answer(State.DONE if serving == request.replicas else State.FAILED)

    def _tell(self, line: str) -> None:
        self._means.note(f"scale: {line}")
        self._lines.append(line)

    async def _answer(self, state: State) -> None:
        """Writes what came of the newest wish; with a last word it is answered."""
        assert self._request is not None
        answer = ScaleAnswer(self._request.id, tuple(self._lines), state)
        self._written = len(self._lines)
        if state is not State.UNDER_WAY:
            self._request = None
        try:
            await asyncio.to_thread(answer.write, self._run)
        except OSError as error:
            self._means.note(f"warning: {self._run.scale_answer} could not be written: {error.strerror}")


def _last_words(replica: Replica, had: int | None, unfinished: int) -> str:
    """What to tell of a replica that has ended with so many groups `unfinished`."""
    again = replica.rolled_again
    if unfinished and replica.error is not None:
        line = f"{replica.name} ended with {unfinished} group(s) in flight: {_reason(replica.error)}"
    else:
        line = f"{replica.name} " + ("ended" if had is None else f"drained {had - len(again)} group(s) and ended")
    if again:
        line += f"; it did not finish group(s) {', '.join(map(str, sorted(again)))}: they are rolled again elsewhere"
    return line


def _reason(error: BaseException) -> str:
    """Of an error in another process: what was raised there, not Ray's account of it."""
    error = getattr(error, "cause", None) or error
    said = first_line(error)
    return said if isinstance(error, VerstError) else f"{type(error).__name__}: {said}"
