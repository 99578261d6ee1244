"""Another number of replicas while a run goes on: the real loop, replicas and transfer, with workers that record what is asked of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.loop.fakes import FakeParts, FakeTrainers, NothingLost, config, group
from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError, DeadlineExceeded, EngineFailure, InvariantViolation, ModelError
from verst.journal.codec import encode_group
from verst.runtime import replacer, replica, scaler
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.changes import journal_changes
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.placement import Placement
from verst.runtime.pools import Replicas
from verst.runtime.recovery import Cursor, Restored
from verst.runtime.replacer import Replacer
from verst.runtime.replica import fresh
from verst.runtime.rollout_worker import Pulled, Seat
from verst.runtime.rundir import RunDirectory
from verst.runtime.scale_request import ScaleAnswer, ScaleRequest, State
from verst.runtime.scaler import Means, Scaler
from verst.runtime.trainer_worker import Published
from verst.runtime.trainers import Trainers
from verst.runtime.transfer import Transfer
from verst.types import Manifest, Prompt
from verst.weights.group import GroupAddress

LIMIT_S = 20.0
STEPS = 10_000
"""More than a test waits for: it stops the loop when it has seen enough."""
AHEAD = {"group_size": 2, "capacity_groups": 6, "window_groups": 2, "deadline_s": 5.0}


async def nothing(number: int) -> None: ...


@dataclass
class World:
    """What all replicas do, each told its number, and what they did, in order."""

    start: Callable[[int], Awaitable[None]] = nothing
    answer: Callable[[int], Awaitable[None]] = nothing  # once it has started
    roll: Callable[[int], Awaitable[None]] = nothing
    pull: Callable[[int, int], Awaitable[None]] = lambda number, version: nothing(number)
    probe: Callable[[int], float] = lambda number: 0.0
    events: list[str] = field(default_factory=list)
    rolled: list[tuple[int, int, int]] = field(default_factory=list)  # (replica, group, version)
    drained: list[tuple[str, int, int]] = field(default_factory=list)  # ("drain" or "admit", replica, version)
    seats: dict[int, Seat | None] = field(default_factory=dict)  # of each replica's newest pull

    async def seen(self, event: str) -> None:
        async with asyncio.timeout(LIMIT_S):
            while event not in self.events:  # noqa: ASYNC110 - a list has no events
                await asyncio.sleep(0.001)


class Recorder:
    """A replica's worker."""

    def __init__(self, number: int, world: World) -> None:
        self._number, self._world, self._version = number, world, -1

    async def start(self, scores: bool) -> None:
        self._world.events.append(f"start {self._number}")
        await self._world.start(self._number)

    async def check(self) -> None:
        await self._world.answer(self._number)

    async def weight_ranks(self) -> int:
        return 1

    async def standing(self) -> dict[int, tuple[str, float]]:
        return {}

    async def roll(self, seq: int, prompt: Prompt, how: str, known: Any) -> bytes:
        version = self._version
        self._world.rolled.append((self._number, seq, version))
        await asyncio.sleep(0.001 * (seq % 3))
        await self._world.roll(self._number)
        return encode_group(group(seq, version))

    async def pull(self, manifest: Manifest, probe_T: Any, seat: Seat | None) -> Pulled:
        self._world.events.append(f"pull {manifest.version} {self._number}")
        self._world.seats[self._number] = seat
        await self._world.pull(self._number, manifest.version)
        self._version = manifest.version
        self._world.events.append(f"serve {manifest.version} {self._number}")
        return Pulled(np.array([0, self._world.probe(self._number), 0], np.float32), {"generated_tokens": 1.0})

    async def drain(self) -> None:
        self._world.drained.append(("drain", self._number, self._version))

    async def admit(self) -> None:
        self._world.drained.append(("admit", self._number, self._version))

    async def close(self) -> None:
        self._world.events.append(f"close {self._number}")


class Killable(LocalWorker):
    def __init__(self, number: int, world: World) -> None:
        super().__init__(f"replica {number}", Recorder(number, world))
        self._note = lambda: world.events.append(f"kill {number}")

    def kill(self) -> None:
        self._note()


class Broadcasters(FakeTrainers):
    """Trainers whose weights come by a group. `sent`: the versions, each with the group that was formed for it."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(events)
        self.sent: list[tuple[int, str | None]] = []

    async def host_group(self, name: str, world: int, *, shared: bool) -> GroupAddress:
        return GroupAddress("host", 1, name, world, shared)

    async def publish(self, version: int, location: str | None, probe_T: Any) -> Published:
        return Published((await super().publish(version, location, probe_T)).manifest)

    async def send(self, manifest: Manifest, probe_T: Any, address: GroupAddress | None) -> NDArray[np.float32]:
        self.sent.append((manifest.version, address and f"{address.name} of {address.world}"))
        return np.zeros(3, np.float32)


class Scaled:
    """A run of so many replicas, and the files by which it is asked for others."""

    def __init__(self, root: Path, world: World, replicas: int = 1, by_group: bool = False, **sections: dict[str, Any]) -> None:
        rollout = AHEAD | sections.pop("rollout", {}) | {"replicas": replicas}
        if by_group:
            sections["weights"] = {"transport": "group"}
        self.config: Config = config(run={"steps": STEPS}, rollout=rollout, **sections)
        self.world = world
        self.parts = FakeParts(self.config, root)
        self.replicas = Replicas(fresh([Killable(n, world) for n in range(replicas)]), self.config)
        keep: Any = self.parts.keep_stacks
        replacing = Replacer(self.replicas, self._spawn, self.parts.faults, keep)
        self.parts.watching = [replacing, self.replicas.salvage]
        self.parts.replicas = self.replicas  # pyright: ignore[reportAttributeAccessIssue]
        if by_group:
            self.parts.trainers = Broadcasters(self.parts.events)
        trainers = cast(Trainers, self.parts.trainers)
        self.transfer = self.parts.transfer = Transfer(self.config, Placement(0, 0), trainers, self.replicas, "somewhere")  # pyright: ignore[reportAttributeAccessIssue]
        values = {"run": {"name": "r", "dir": str(root), "steps": STEPS}, "model": {"path": "m"}, "rollout": {"replicas": replicas}}
        self.run = RunDirectory.create(load_config(values), None, {})
        self.loop = Loop(self.config, cast(Parts, self.parts), Restored(0, Cursor(0, self.parts.stream.state())))
        self.refused: str | None = None
        self.no_process: Exception | None = None

    def _check(self, number: int) -> None:
        if self.refused:
            raise ConfigError(self.refused)

    def _spawn(self, number: int, slot: int) -> Killable:
        if self.no_process is not None:
            raise self.no_process
        return Killable(number, self.world)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The loop and the scaler go on within, and end in order after it, as they do in a run."""
        means = Means(
            self._spawn, self._check, self.parts.note, lambda: self.loop.version, lambda: journal_changes(self.run, self.parts.journal)
        )
        _, read = RunDirectory.open(self.run.root)

        async def run() -> None:
            try:
                await self.replicas.start(True, NothingLost())
                await self.transfer.open("run")
                async with Scaler(self.run, read, self.replicas, means).following():
                    await self.loop.run()
            finally:
                await self.replicas.close()

        whole = asyncio.create_task(run())
        try:
            yield
        finally:
            self.loop.stop()
            await asyncio.wait_for(whole, LIMIT_S)

    async def reported(self, steps: int) -> None:
        """Waits until so many more steps were reported."""
        await self.parts.reported(self.loop.version + steps)

    def ask(self, replicas: int) -> ScaleRequest:
        request = ScaleRequest.new(replicas)
        request.write(self.run)
        return request

    async def answered(self, request: ScaleRequest) -> ScaleAnswer:
        async with asyncio.timeout(LIMIT_S):
            while True:
                answer = ScaleAnswer.read(self.run)
                if answer is not None and answer.id == request.id and answer.state is not State.UNDER_WAY:
                    return answer
                await asyncio.sleep(0.005)

    async def scaled(self, replicas: int) -> ScaleAnswer:
        return await self.answered(self.ask(replicas))

    def require_sound(self, *, twice: Set[int] | None = frozenset()) -> None:
        """Every group was trained once, by the window's order and within the bound, and rolled once, but for those rolled `twice`.

        None: any may have been.
        """
        trained = self.parts.trainers.trained
        done = len(trained)
        assert len(set(trained)) == done
        assert max(trained) < done + self.config.rollout.window_groups, "a group was lost, or left far behind"
        assert max(row["staleness/max"] for row in self.parts.rows.values()) <= self.config.worst_staleness
        rolled = Counter(seq for _, seq, _ in self.world.rolled)
        assert sorted(rolled) == list(range(len(rolled)))
        assert twice is None or {seq for seq, times in rolled.items() if times > 1} == twice
        assert set(trained) <= set(self.parts.journal.index.groups)

    def ended(self) -> list[int]:
        """The replicas whose processes were ended, in order. Each was closed before."""
        kills = [event for event in self.world.events if event.startswith("kill ")]
        for kill in kills:
            assert kill.replace("kill", "close") in self.world.events[: self.world.events.index(kill)]
        return [int(kill.split()[1]) for kill in kills]

    def recorded(self) -> list[list[int]]:
        """Changes of the number that a resumed run begins with. The journal has each too."""
        assert [change.options for change in self.parts.journal.changes()] == [change["options"] for change in self.run.changes]
        return [change["options"]["rollout.replicas"] for change in self.run.changes]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaler._POLL_S == 1.0
    monkeypatch.setattr(scaler, "_POLL_S", 0.01)


async def takes_a_while(number: int) -> None:
    await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - lists have no events
            await asyncio.sleep(0.001)


class Gates:
    """Holds the groups that a replica is given while its gate is shut."""

    def __init__(self) -> None:
        self._open = [asyncio.Event() for _ in range(4)]
        self._expired: set[int] = set()
        self.held = [0] * len(self._open)
        for number in range(len(self._open)):
            self.open(number)

    def shut(self, number: int) -> None:
        self._open[number].clear()

    def open(self, number: int) -> None:
        self._open[number].set()

    def expire(self, number: int) -> None:
        """Those that are held have passed their limit."""
        self._expired.add(number)
        self.open(number)

    async def roll(self, number: int) -> None:
        if self._open[number].is_set():
            return await takes_a_while(number)
        self.held[number] += 1
        await self._open[number].wait()
        if number in self._expired:
            raise DeadlineExceeded("waited 5 s for the engine")


async def test_three_and_one_again_while_rollout_runs_ahead(tmp_path: Path):
    world = World(roll=takes_a_while)
    run = Scaled(tmp_path, world)
    async with run.running():
        await run.reported(3)
        grown = await run.scaled(3)
        await until(lambda: {0, 1, 2} == {n for n, _, _ in world.rolled})
        await run.reported(4)
        shrunk = await run.scaled(1)
        before = len(world.rolled)
        await run.reported(4)
    run.require_sound()
    assert max(row["staleness/max"] for row in run.parts.rows.values()) > 0, "rollout did not run ahead"
    assert (grown.state, shrunk.state) == (State.DONE, State.DONE)
    assert (grown.lines[0], grown.lines[-1]) == ("1 replica(s) serve, 3 are wanted", "3 replica(s) serve")
    for number in (1, 2):
        first = min(version for n, _, version in world.rolled if n == number)
        (line,) = [line for line in grown.lines if line.startswith(f"replica {number} serves from version ")]
        assert 0 < int(line.split()[5]) <= first, "it was given a group before it held a version"
        assert f"replica {number} is ready, and waits for the trainers to give it their weights" in grown.lines
    assert [line.split(" group(s)")[1] for line in shrunk.lines if "drained" in line] == [" and ended"] * 2
    assert {n for n, _, _ in world.rolled[before:]} == {run.ended()[-1]}
    assert sorted(run.ended()) == [0, 1, 2]
    replicas = [run.parts.rows[step]["replicas"] for step in sorted(run.parts.rows)]
    assert (replicas[0], max(replicas), replicas[-1]) == (1.0, 3.0, 1.0)
    _, read = RunDirectory.open(run.run.root)
    assert read.rollout.replicas == 1
    assert (run.recorded()[0][0], max(map(max, run.recorded())), run.recorded()[-1][1]) == (1, 3, 1)
    assert not any("warning" in note for note in run.parts.notes if "checkpoint" not in note)


ROOMY = {"capacity_groups": 12, "window_groups": 10}


async def told_to_leave(run: Scaled) -> int:
    """Which of two replicas it was, once it is told: the least busy one, which is a matter of chance."""

    def told() -> list[int]:
        return [n for n in (0, 1) if any(f"replica {n} is given no more groups" in note for note in run.parts.notes)]

    await until(lambda: bool(told()))
    return told()[0]


async def test_what_a_removed_replica_has_in_flight_is_finished_by_it(tmp_path: Path):
    """Groups are held as it is told to leave; then those of the other go on, and a version comes which does not reach it."""
    gates = Gates()
    world = World(roll=gates.roll)
    run = Scaled(tmp_path, world, replicas=2, rollout=ROOMY)
    async with run.running():
        await run.reported(1)
        gates.shut(0)
        gates.shut(1)
        await until(lambda: min(gates.held[:2]) > 3)
        request = run.ask(1)
        leaver = await told_to_leave(run)
        events = len(world.events)
        gates.open(1 - leaver)
        await run.reported(1)
        had = gates.held[leaver]
        assert f"close {leaver}" not in world.events
        gates.open(leaver)
        answer = await run.answered(request)
        await run.reported(2)
    run.require_sound()
    assert had > 0
    assert f"replica {leaver} is given no more groups; it has {had} in flight" in answer.lines
    assert f"replica {leaver} drained {had} group(s) and ended" in answer.lines
    assert gates.held[leaver] == had, "it was given a group after it was told to leave"
    assert {event.split()[2] for event in world.events[events:] if event.startswith("pull")} == {str(1 - leaver)}


async def rolled_again(run: Scaled) -> list[int]:
    """The groups that were, once all of them are trained."""
    times = Counter(seq for _, seq, _ in run.world.rolled)
    again = sorted(seq for seq in times if times[seq] > 1)
    await until(lambda: set(again) <= set(run.parts.trainers.trained))
    return again


async def test_groups_that_it_does_not_finish_are_rolled_again_elsewhere(tmp_path: Path):
    """They hang until their limit, which the replica tells as it does of its engine."""
    gates = Gates()
    run = Scaled(tmp_path, World(roll=gates.roll), replicas=2, rollout=ROOMY)
    async with run.running():
        await run.reported(1)
        gates.shut(0)
        gates.shut(1)
        await until(lambda: min(gates.held[:2]) > 0)
        request = run.ask(1)
        leaver = await told_to_leave(run)
        gates.open(1 - leaver)
        gates.expire(leaver)
        answer = await run.answered(request)
        await run.reported(2)
        again = await rolled_again(run)
    run.require_sound(twice=set(again))
    assert again
    (line,) = [line for line in answer.lines if "rolled again elsewhere" in line]
    assert f"it did not finish group(s) {', '.join(map(str, again))}: they" in line
    assert answer.state is State.DONE


async def test_a_group_has_the_limit_that_it_got_with_many_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It hangs, while the others finish that its replica had; then that is told to leave."""
    monkeypatch.setattr(scaler, "_MARGIN_S", 0.2)
    held, others, last, shut = [0, 0], asyncio.Event(), [asyncio.Event(), asyncio.Event()], False

    async def roll(number: int) -> None:
        if not shut:
            return await takes_a_while(number)
        held[number] += 1
        await (last[number] if held[number] == 4 else others).wait()

    run = Scaled(tmp_path, World(roll=roll), replicas=2, rollout=ROOMY)
    monkeypatch.setattr(run.replicas, "deadline_s", lambda groups: 0.5 * groups)
    async with run.running():
        await run.reported(1)
        shut = True
        await until(lambda: min(held) >= 4)
        shut = False
        others.set()
        await until(lambda: min(replica.in_flight for replica in run.replicas.active) == 1)
        request = run.ask(1)
        leaver = await told_to_leave(run)
        last[1 - leaver].set()
        answer = await run.answered(request)
        await run.reported(2)
        (seq,) = await rolled_again(run)
    run.require_sound(twice={seq})
    assert any(f"and ended; it did not finish group(s) {seq}: they are rolled again elsewhere" in line for line in answer.lines)
    assert (answer.state, run.ended()) == (State.DONE, [leaver, 1 - leaver])


class Held:
    """Groups that two replicas hold from a moment on: until their replica goes on, or its process ends."""

    def __init__(self) -> None:
        self.world = World(roll=self._roll)
        self.shut = False
        self.goes_on: set[int] = set()
        self.count = [0, 0]

    async def _roll(self, number: int) -> None:
        if not self.shut or number in self.goes_on:
            return await takes_a_while(number)
        self.count[number] += 1
        await until(lambda: not self.shut or number in self.goes_on or f"kill {number}" in self.world.events)
        if self.shut and number not in self.goes_on:
            raise WorkerDied(f"replica {number} died (roll)")

    async def ended_without_its_groups(self, run: Scaled, request: ScaleRequest, because: str) -> None:
        """The replica that is told to leave, and the other goes on."""
        leaver = await told_to_leave(run)
        self.goes_on.add(1 - leaver)
        answer = await run.answered(request)
        await run.reported(2)
        again = await rolled_again(run)
        run.require_sound(twice=set(again))
        assert len(again) == self.count[leaver] > 0
        assert (
            f"replica {leaver} ended with {len(again)} group(s) in flight: {because.format(leaver)}; "
            f"it did not finish group(s) {', '.join(map(str, again))}: they are rolled again elsewhere"
        ) in answer.lines
        assert (answer.state, run.ended()) == (State.DONE, [leaver])


async def test_one_that_does_not_finish_in_time_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The limits of its groups are longer than what is waited for them."""
    monkeypatch.setattr(scaler, "_MARGIN_S", 0.2)
    held = Held()
    run = Scaled(tmp_path, held.world, replicas=2, rollout=ROOMY)
    async with run.running():
        await run.reported(1)
        held.shut = True
        await until(lambda: min(held.count) > 0)
        monkeypatch.setattr(run.replicas, "deadline_s", lambda groups: 60 if len(run.replicas.active) > 1 else 0.8)
        await held.ended_without_its_groups(run, run.ask(1), "waited 1 s for the groups that replica {} has in flight")


async def test_one_that_cannot_take_a_version_while_it_leaves_ends_without_its_groups(tmp_path: Path):
    """It is told to leave in the middle of a pull that fails: its engine is paused, and no other version will come to it."""
    held, pulling = Held(), [False, False]

    async def pull(number: int, version: int) -> None:
        if held.shut:
            pulling[number] = True
            await until(lambda: not held.shut or bool(held.goes_on))
            if held.shut and number not in held.goes_on:
                raise EngineFailure("the server is gone")

    held.world.pull = pull
    run = Scaled(tmp_path, held.world, replicas=2, rollout=ROOMY)
    async with run.running():
        await run.reported(1)
        while not held.shut:
            held.shut, pulling[:], held.count[:] = True, [False, False], [0, 0]
            try:
                await asyncio.wait_for(until(lambda: all(pulling) and min(held.count) > 0), 2)
            except TimeoutError:  # held where no pull comes, as the other groups of its batch are held too: once more
                held.shut = False
                await asyncio.sleep(0.1)
        await held.ended_without_its_groups(run, run.ask(1), "the server is gone")


async def test_who_comes_or_goes_in_the_middle_of_a_publish_waits_for_its_end(tmp_path: Path):
    """Replica 1 is told to leave while it pulls version 3; replica 2 is ready in the middle of version 5."""
    reached, let = {3: asyncio.Event(), 5: asyncio.Event()}, {3: asyncio.Event(), 5: asyncio.Event()}

    async def pull(number: int, version: int) -> None:
        if version in let:
            reached[version].set()
            await let[version].wait()

    world = World(pull=pull)
    run = Scaled(tmp_path, world, replicas=2)
    async with run.running():
        await asyncio.wait_for(reached[3].wait(), LIMIT_S)
        leaving = run.ask(1)
        await asyncio.sleep(0.2)
        assert any("replica 1 is given no more groups" in note for note in run.parts.notes)
        assert "close 1" not in world.events
        let[3].set()
        assert (await run.answered(leaving)).state is State.DONE
        await asyncio.wait_for(reached[5].wait(), LIMIT_S)
        coming = run.ask(2)
        await world.seen("start 2")
        await asyncio.sleep(0.1)
        assert any("replica 2 is ready" in note for note in run.parts.notes)
        let[5].set()
        assert "replica 2 serves from version 6 on" in (await run.answered(coming)).lines
        await run.reported(1)
    run.require_sound()
    assert world.events.index("serve 3 1") < world.events.index("close 1")
    assert not {"pull 4 1", "pull 5 2"} & set(world.events)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelError("no such weights"), "no such weights"),
        (RuntimeError("CUDA error: out of memory\nof a long kind"), "RuntimeError: CUDA error: out of memory"),
    ],
)
async def test_a_start_that_fails_leaves_the_run_as_it_was(tmp_path: Path, error: Exception, reason: str):
    async def start(number: int) -> None:
        if number == 1:
            raise error

    run = Scaled(tmp_path, World(start=start))
    async with run.running():
        await run.reported(1)
        answer = await run.scaled(3)
        await run.reported(2)
        assert len(run.replicas.active) == 2
        again = await run.scaled(3)
    run.require_sound()
    assert answer.state is State.FAILED
    assert f"replica 1 could not start: {reason}" in answer.lines
    assert answer.lines[-1] == "2 replica(s) serve, 3 were wanted"
    assert again.state is State.DONE
    assert "replica 3 starts" in again.lines, "a number was used again"
    assert run.ended()[0] == 1
    assert [after for _, after in run.recorded()] == [2, 3]
    _, read = RunDirectory.open(run.run.root)
    assert read.rollout.replicas == 3, "a resumed run would begin with another number"


async def test_a_new_replica_that_cannot_take_a_version_is_refused_and_nobody_else_notices(tmp_path: Path):
    async def pull(number: int, version: int) -> None:
        if number == 1:
            raise EngineFailure("the server is gone")

    run = Scaled(tmp_path, World(pull=pull, probe=lambda number: 10.0 if number == 2 else 0.0))
    async with run.running():
        await run.reported(1)
        answer = await run.scaled(3)
        await run.reported(2)
    run.require_sound()
    assert answer.state is State.FAILED
    assert "replica 1 could not join: the server is gone" in answer.lines
    assert any(line.startswith("replica 2 could not join: version") and "disagree by 5 on average" in line for line in answer.lines)
    assert {n for n, _, _ in run.world.rolled} == {0}
    assert sorted(run.ended()[:2]) == [1, 2]
    assert run.recorded() == []


async def test_a_group_that_a_new_replica_broke_is_formed_again_without_it(tmp_path: Path):
    """It dies as the group meets, so that all others wait in vain."""

    async def pull(number: int, version: int) -> None:
        seat = world.seats[number]
        if number == 2:
            raise EngineFailure("the server is gone")
        if seat is not None and seat.address.world == 4:
            raise DeadlineExceeded("not all of 4 members met")

    world = World(pull=pull)
    run = Scaled(tmp_path, world, by_group=True, replicas=2)
    async with run.running():
        await run.reported(1)
        answer = await run.scaled(3)
        assert (await run.scaled(1)).state is State.DONE
        await run.reported(2)
    run.require_sound()
    assert "replica 2 could not join: the server is gone" in answer.lines
    formed = [(version, address) for version, address in cast(Broadcasters, run.parts.trainers).sent if address]
    assert [address for _, address in formed][-1].endswith("of 2")
    versions = [version for version, _ in formed]
    assert versions == sorted(versions)


async def test_one_that_died_before_it_could_join_holds_up_no_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert replica.ANSWER_S == 5
    monkeypatch.setattr(replica, "ANSWER_S", 0.2)
    asked: Counter[int] = Counter()

    async def answer(number: int) -> None:
        asked[number] += 1
        if (number, asked[number]) == (1, 1):
            await asyncio.sleep(3600)
        if (number, asked[number]) == (2, 1):
            raise WorkerDied("replica 2 died (check)")

    run = Scaled(tmp_path, World(answer=answer), by_group=True)
    async with run.running():
        await run.reported(1)
        refused = await run.scaled(3)
        grown = await run.scaled(2)
    run.require_sound()
    assert "replica 1 could not join: waited 0.2 s for replica 1 to answer" in refused.lines
    assert "replica 2 could not join: replica 2 died (check)" in refused.lines
    assert (refused.state, grown.state) == (State.FAILED, State.DONE)
    assert not [event for event in run.world.events if event.startswith("pull") and event.split()[2] in "12"]
    formed = [address for _, address in cast(Broadcasters, run.parts.trainers).sent if address]
    assert formed == ["run/1 of 2", "run/2 of 3"]


async def test_what_nobody_expected_fails_the_wish_and_not_the_run(tmp_path: Path):
    run = Scaled(tmp_path, World())
    run.no_process = RuntimeError("the cluster has lost a node\nand more")
    async with run.running():
        await run.reported(1)
        failed = await run.scaled(3)
        await run.reported(2)
        run.no_process = None
        grown = await run.scaled(2)
    run.require_sound()
    assert failed.lines == ("1 replica(s) serve, 3 are wanted", "failed: RuntimeError: the cluster has lost a node")
    assert f"scale: {failed.lines[-1]}" in run.parts.notes
    assert (failed.state, grown.state) == (State.FAILED, State.DONE)


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_scaler_that_is_gone_neither_fails_a_run_nor_hides_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: bool
):
    async def gone(self: Scaler) -> None:
        raise MemoryError

    monkeypatch.setattr(Scaler, "_follow", gone)

    async def pull(number: int, version: int) -> None:
        if crashes and version == 3:
            raise InvariantViolation("crashed on purpose")

    run = Scaled(tmp_path, World(pull=pull))
    with pytest.raises(InvariantViolation, match="crashed on purpose") if crashes else contextlib.nullcontext():
        async with run.running():
            await (run.world.seen("kill 0") if crashes else run.reported(2))


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_replica_that_cannot_take_a_version_is_replaced(tmp_path: Path, by_group: bool, replicas: int):
    """With another one the run goes on meanwhile; without, the version waits for the replacement."""

    async def pull(number: int, version: int) -> None:
        if number == 0 and version == 3:
            raise EngineFailure("the server is gone")

    run = Scaled(tmp_path, World(pull=pull), replicas=replicas, by_group=by_group)
    async with run.running():
        await until(lambda: bool(run.parts.journal.recoveries()))
        await run.reported(4)
    run.require_sound(twice=None)
    assert run.world.events.index("kill 0") < run.world.events.index(f"start {replicas}")
    assert any(f"replica {replicas} takes the place of replica 0 from version" in note for note in run.parts.notes)
    served = [event for event in run.world.events if event.startswith("serve ") and event.endswith(f" {replicas}")]
    assert served, "the one that takes its place"
    assert int(served[0].split()[1]) >= 3, "it begins with the version that is served, or a newer one"
    faults, recoveries = run.parts.journal.faults(), run.parts.journal.recoveries()
    assert [(fault.role, fault.reason) for fault in faults] == [("replica 0", "the server is gone")]
    assert [(back.role, back.source) for back in recoveries] == [("replica 0", "replacement")]


async def test_groups_in_flight_move_to_others_when_their_replica_dies(tmp_path: Path):
    gates = Gates()

    async def roll(number: int) -> None:
        await gates.roll(number)
        if number == 1 and broken.is_set():
            raise WorkerDied("replica 1 died (roll)")

    broken = asyncio.Event()
    run = Scaled(tmp_path, World(roll=roll), replicas=2, rollout=ROOMY)
    async with run.running():
        await run.reported(1)
        gates.shut(1)
        await until(lambda: gates.held[1] > 2)
        broken.set()
        gates.open(1)
        await run.reported(3)
        await run.world.seen("start 2")
    run.require_sound(twice=None)
    assert [fault.role for fault in run.parts.journal.faults()] == ["replica 1"]


async def test_a_replica_that_cannot_be_replaced_ends_the_run_if_it_was_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replacer, "PAUSES_S", (0.0, 0.01, 0.01))

    async def start(number: int) -> None:
        if number:
            raise ModelError("no such weights")

    async def pull(number: int, version: int) -> None:
        if version == 3:
            raise EngineFailure("the server is gone")

    run = Scaled(tmp_path, World(pull=pull, start=start))
    with pytest.raises(EngineFailure, match=r"replica 0 was lost \(the server is gone\) and could not be replaced: no such weights"):
        async with run.running():
            await run.world.seen("kill 3")
    assert run.parts.journal.index.last_commit in (3, 4), "what was committed before is safe, the groups that were rolled ahead included"


async def test_a_newer_wish_counts_and_what_nobody_needs_any_more_ends(tmp_path: Path):
    async def start(number: int) -> None:
        if number:
            await asyncio.sleep(3600)

    run = Scaled(tmp_path, World(start=start))
    async with run.running():
        await run.reported(1)
        run.ask(3)
        await run.world.seen("start 2")
        answer = await run.scaled(1)
        assert answer.state is State.DONE
        assert {"replica 1 ended", "replica 2 ended"} <= set(answer.lines)
        assert sorted(run.ended()) == [1, 2]
    run.require_sound()


@pytest.mark.parametrize("crashes", [False, True])
async def test_nothing_is_left_running_when_a_run_ends_in_the_middle(tmp_path: Path, crashes: bool):
    """One replica starts, and one leaves that has groups which hang."""
    gates, broken = Gates(), asyncio.Event()

    async def start(number: int) -> None:
        if number > 1:
            await asyncio.sleep(3600)

    async def roll(number: int) -> None:
        await gates.roll(number)
        if broken.is_set():
            raise InvariantViolation("crashed on purpose")

    run = Scaled(tmp_path, World(start=start, roll=roll), replicas=2, rollout=ROOMY)
    with pytest.raises(InvariantViolation, match="crashed on purpose") if crashes else contextlib.nullcontext():
        async with run.running():
            await run.reported(1)
            gates.shut(0)
            gates.shut(1)
            await until(lambda: min(gates.held[:2]) > 3)
            run.ask(1)
            leaver = await told_to_leave(run)
            request = run.ask(2)
            await run.world.seen("start 2")
            if crashes:
                broken.set()
                gates.open(1 - leaver)
                await run.world.seen("kill 2")
    assert sorted(run.ended()) == [0, 1, 2]
    answer = ScaleAnswer.read(run.run)
    assert answer is not None
    assert (answer.id, answer.state) == (request.id, State.FAILED)
    assert answer.lines[-1] == "the run has ended with 1 replica(s) that served"
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "_come" in repr(task) or "_go" in repr(task) or "_follow" in repr(task)]


async def test_what_the_run_cannot_do_is_refused_in_its_words(tmp_path: Path):
    run = Scaled(tmp_path, World())
    run.refused = "1 trainer rank(s) and 9 replica(s) need 10 GPUs, the cluster has 2"
    async with run.running():
        answer = await run.scaled(9)
    assert answer == ScaleAnswer(answer.id, (run.refused,), State.REFUSED)
    assert f"scale: 9 replica(s) refused: {run.refused}" in run.parts.notes
    assert "start 1" not in run.world.events


async def test_one_that_is_new_holds_up_no_publish_that_waits_for_groups(tmp_path: Path):
    """Groups in flight finish before a version; a new replica has none, and what it cannot answer is not asked."""
    run = Scaled(tmp_path, World(roll=takes_a_while), replicas=2, weights={"in_flight": "finish", "deadline_s": 5.0})
    async with run.running():
        await run.reported(1)
        assert (await run.scaled(3)).state is State.DONE
        await run.reported(2)
        await until(lambda: any(n == 2 for n, *_ in run.world.rolled))
        assert (await run.scaled(1)).state is State.DONE
        await run.reported(1)
    run.require_sound()
    assert min(version for n, _, version in run.world.rolled if n == 2) > 0
    assert ("drain", 2, -1) not in run.world.drained
    assert {n for event, n, _ in run.world.drained if event == "drain"} >= {0, 1}
    drains, admits = (Counter(n for event, n, _ in run.world.drained if event == e) for e in ("drain", "admit"))
    assert drains == admits, "a replica was left waiting"
