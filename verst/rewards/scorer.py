"""Scores groups in worker processes, with a deadline for each trajectory.

A failure is attributed to the trajectory it hit and is never a silent 0.

Who waits for whom: a group is cut into one request for each worker, and a request waits for a free worker. The worker says when it begins
and when each trajectory is scored, so the deadline runs for one trajectory at a time, and when a worker dies the first one that is not
scored did it; the rest of the request goes to its replacement. A worker that dies before it begins was not ended by a trajectory, and the
request goes to its replacement. One that is killed (SIGKILL) may have been ended by its memory or by nothing in it: the trajectory is tried
once more.

Async rewards mostly wait, so a worker takes many of their trajectories at a time, of any group: a trajectory waits for one of the places
(`verst.rewards.together`). After a death those that had begun are tried again, each alone in a worker beside, to find who did it.

A reward that scores groups gets all of one group in one request, for which the deadline is; what ends its worker is a failure of the
whole group.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from verst.errors import RewardFailure, VerstError
from verst.fields import from_json
from verst.rewards.process import Death, RewardProcess
from verst.rewards.spec import RewardSpec
from verst.rewards.together import AT_ONCE, SharedProcess
from verst.types import Group, Status, Trajectory

_BEGIN_ATTEMPTS = 3
"""Workers that may die one after another before they begin with a request; then something ends them all."""


class Scorer:
    """Scores with `workers` processes. `deadline_s` limits one trajectory. Output of the reward goes to `log`, or to stderr.

    `secrets`: environment variables that the reward may see, beside those that its options name (`verst.secrets`). `gpus`: it may use
    those of this process.

    All methods belong to one event loop; `score` may be called concurrently.
    """

    def __init__(
        self,
        reward: RewardSpec,
        *,
        workers: int,
        deadline_s: float,
        log: Path | None = None,
        secrets: Sequence[str] = (),
        gpus: bool = False,
    ) -> None:
        self._reward, self._workers, self._deadline_s, self._log, self._secrets = reward, workers, deadline_s, log, secrets
        self._gpus = gpus
        self._free: asyncio.Queue[RewardProcess | None] = asyncio.Queue()  # None: a place whose worker died
        self._alive: set[RewardProcess] = set()
        self._shared: list[SharedProcess] = []  # of an async reward; then `_free` has the places in which one is tried alone
        self._grouped = False  # whether the reward scores groups
        self._shared_places = asyncio.Semaphore(workers * AT_ONCE)
        self._choosing = asyncio.Lock()
        self._counts: Counter[str] = Counter()
        self._closed = False

    async def start(self) -> None:
        """Starts the workers. Raises `ExtensionError` if the reward cannot be loaded: the reason is in the message."""
        try:
            for worker in await _together([self._spawn() for _ in range(self._workers)]):
                self._grouped = worker.grouped
                if worker.concurrent:
                    self._shared.append(SharedProcess(worker, self._retire))
                self._free.put_nowait(None if worker.concurrent else worker)
        except VerstError:
            self.close()
            raise

    async def score(self, group: Group) -> Group:
        """The group with the reward of each trajectory that has not failed; one whose reward fails is marked failed and says why."""
        start = time.perf_counter()
        waiting = group.trainable
        scored: dict[str, Trajectory] = {}
        if self._shared:
            await _together([self._score_shared(group.prompt.fields, trajectory, scored) for trajectory in waiting])
        else:
            size = (len(waiting) if self._grouped else -(-len(waiting) // self._workers)) or 1
            requests = [waiting[i : i + size] for i in range(0, len(waiting), size)]
            await _together([self._score(group.prompt.fields, request, scored) for request in requests])
        self._counts["scored"] += sum(t.status is not Status.FAILED for t in scored.values())
        trajectories = tuple(scored.get(t.id, t) for t in group.trajectories)
        return replace(group, trajectories=trajectories, timings={**group.timings, "score_s": time.perf_counter() - start})

    def stats(self) -> Mapping[str, float]:
        """Counters since start: `scored`, `failed/deadline`, `failed/crash`, `failed/exception`, `failed/not_a_number`, `workers_lost`."""
        names = ("scored", "failed/deadline", "failed/crash", "failed/exception", "failed/not_a_number", "workers_lost")
        return {name: float(self._counts[name]) for name in names}

    def close(self) -> None:
        """Ends all workers, and returns when they are gone. A `score` still under way raises `RewardFailure`."""
        self._closed = True
        for worker in self._alive:
            worker.kill()
        self._alive.clear()

    @property
    def pids(self) -> Sequence[int]:
        """Of the workers now alive."""
        return [worker.pid for worker in self._alive]

    async def _spawn(self) -> RewardProcess:
        worker = await RewardProcess.start(self._reward, self._deadline_s, self._log, self._secrets, gpus=self._gpus)
        self._alive.add(worker)
        if self._closed:  # while it started
            self._retire(worker)
            raise self._was_closed()
        return worker

    async def _ready(self, worker: RewardProcess | None) -> RewardProcess:
        if worker is not None:
            if worker.alive:
                return worker
            self._retire(worker)  # it died between requests: no trajectory did that
        return await self._spawn()

    def _was_closed(self) -> RewardFailure:
        return RewardFailure(f"the scorer of reward {self._reward.name} was closed while it scored")

    def _retire(self, worker: RewardProcess) -> None:
        self._alive.discard(worker)
        worker.kill()
        self._counts["workers_lost"] += 1

    async def _score_shared(self, fields: Mapping[str, Any], trajectory: Trajectory, scored: dict[str, Trajectory]) -> None:
        """Scores one trajectory beside others; alone, if a worker died of it or of another."""
        async with self._shared_places:
            for _ in range(_BEGIN_ATTEMPTS):
                worker = await self._least_busy()
                reply = await worker.score(fields, trajectory)
                if self._closed:
                    raise self._was_closed()
                if not isinstance(reply, Death):
                    self._take(trajectory, reply, scored)
                    return
                if reply.began:
                    break
        await self._score(fields, [trajectory], scored)

    async def _least_busy(self) -> SharedProcess:
        async with self._choosing:  # one at a time replaces those that died
            for place, worker in enumerate(self._shared):
                if not worker.usable():
                    self._shared[place] = SharedProcess(await self._spawn(), self._retire)
            return min(self._shared, key=lambda worker: worker.busy)

    async def _score(self, fields: Mapping[str, Any], request: Sequence[Trajectory], scored: dict[str, Trajectory]) -> None:
        requests = deque([request])
        killed: set[str] = set()  # trajectories whose worker was
        unbegun = 0
        while requests:
            request = requests.popleft()
            place = await self._free.get()
            worker = None
            idle = False  # whether the worker owes us nothing and can serve the next request
            try:
                worker = await self._ready(place)
                death = await self._exchange(worker, fields, request, scored)
                idle = death is None
            finally:
                if worker and not idle:
                    self._retire(worker)
                self._free.put_nowait(worker if idle else None)
            if self._closed:
                raise self._was_closed()  # that ended the worker: no trajectory did
            unbegun = unbegun + 1 if death and not death.began else 0
            if 0 < unbegun < _BEGIN_ATTEMPTS:
                requests.append(request)
            elif death is not None:
                left = [t for t in request if t.id not in scored]
                if left and death.outside and left[0].id not in killed:
                    killed.add(left[0].id)
                    requests.append(left)
                    continue
                blamed = len(left) if self._grouped else 1
                for trajectory in left[:blamed]:
                    self._fail(trajectory, death.reason, death.words, scored)
                if left[blamed:]:
                    requests.append(left[blamed:])

    async def _exchange(
        self, worker: RewardProcess, fields: Mapping[str, Any], request: Sequence[Trajectory], scored: dict[str, Trajectory]
    ) -> Death | None:
        """Scores one request on one worker. Returns None, or why the worker cannot be used any more."""
        await worker.request(0, fields, request)
        for count in range(1 + len(request)):
            reply = await worker.reply(began=count > 0)
            if isinstance(reply, Death):
                return reply
            if count:  # the first only says that it has begun
                self._take(request[reply["index"]], reply, scored)
        return None

    def _take(self, trajectory: Trajectory, reply: Mapping[str, Any], scored: dict[str, Trajectory]) -> None:
        if recorded := reply["recorded"]:
            trajectory = replace(trajectory, info={**trajectory.info, **recorded})
        if "error" in reply:
            self._fail(trajectory, reply["reason"], reply["error"], scored)
        else:
            fields = {**trajectory.fields, **from_json(reply["fields"])}
            scored[trajectory.id] = replace(trajectory, reward=reply["reward"], fields=fields)

    def _fail(self, trajectory: Trajectory, reason: str, words: str, scored: dict[str, Trajectory]) -> None:
        self._counts[f"failed/{reason}"] += 1
        scored[trajectory.id] = trajectory.failed(f"reward {self._reward.name} {words}")


async def _together(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Their results. If one raises, the others are cancelled and the error is raised as it is, not as a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
