"""A whole run with real engines whose weights come by a process group (gloo), while replicas come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, end_rewards, local_run
from tests.loop.test_run import ROWS, digests, vowels
from verst.journal.log import JournalReader
from verst.runtime import scaler
from verst.runtime.actors import Host, LocalWorker, WorkerDied
from verst.runtime.rundir import RunDirectory
from verst.runtime.scale_request import ScaleAnswer, ScaleRequest, State
from verst.runtime.service import RunService

pytestmark = pytest.mark.usefixtures("_one_thread")
LIMIT_S = 60.0


class HostWorker(LocalWorker):
    """A worker in this process behind a real `Host`: its synchronous methods have a thread, in which they are done one after another."""

    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name, None)
        self._host = host
        self.killed = False

    async def call(self, method: str, /, *args: Any) -> Any:
        return await self._host.call(method, *args)

    post = call

    async def stacks(self) -> str:
        return await self._host.stacks()

    def kill(self) -> None:
        self.killed = True
        end_rewards(self._host._object)
        self._host._thread.shutdown(wait=False)


class DeadWhenItJoins(HostWorker):
    """It starts, and answers to the last moment."""

    async def call(self, method: str, /, *args: Any) -> Any:
        if method == "pull":
            raise WorkerDied(f"{self.name} died (pull)")
        return await super().call(method, *args)


async def scaled(run: RunDirectory, replicas: int) -> ScaleAnswer:
    request = ScaleRequest.new(replicas)
    request.write(run)
    async with asyncio.timeout(LIMIT_S):
        while True:
            answer = ScaleAnswer.read(run)
            if answer is not None and answer.id == request.id and answer.state is not State.UNDER_WAY:
                return answer
            await asyncio.sleep(0.02)


async def two_steps(run: LocalRun, running: asyncio.Task[None]) -> None:
    def rows() -> int:
        return len(run.rows) if run.run.metrics.exists() else 0

    before = rows()
    async with asyncio.timeout(LIMIT_S):
        while rows() < before + 2 and not running.done():  # noqa: ASYNC110 - a file has no events
            await asyncio.sleep(0.02)


async def scaled_in_turn(run: LocalRun, spawn: Any, *replicas: int) -> list[ScaleAnswer]:
    """The run, with so many replicas one after the other, and steps before, between and after."""
    service = RunService(str(run.run.root), spawn)
    running = asyncio.create_task(service.run())
    answers = []
    try:
        await two_steps(run, running)
        for number in replicas:
            answers.append(await scaled(run.run, number))
            await two_steps(run, running)
    finally:
        await service.stop()
        await asyncio.wait_for(running, LIMIT_S)
    return answers


def prepared(tmp_path: Path, model: Path, name: str, steps: int) -> LocalRun:
    values = {
        "run": {"name": name, "dir": str(tmp_path), "steps": steps, "seed": 1},
        "weights": {"transport": "group"},
        "checkpoint": {"export_final": False, "every_steps": 1000},
    }
    return local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)


async def test_the_group_is_formed_anew_and_the_weights_are_those_of_a_run_that_nobody_scaled(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaler, "_POLL_S", 0.05)
    workers: dict[str, HostWorker] = {}

    def spawn(name: str, factory: Any, *args: Any, gpus: float = 0, env: Any = None) -> HostWorker:
        workers[name] = HostWorker(name, Host(factory, *args))
        return workers[name]

    run = prepared(tmp_path, model, "scaled", steps=10_000)
    grown, shrunk = await scaled_in_turn(run, spawn, 3, 1)
    assert (grown.state, shrunk.state) == (State.DONE, State.DONE)
    steps = len(digests(run))
    plain = prepared(tmp_path, model, "plain", steps)
    await RunService(str(plain.run.root), spawn).run()
    assert digests(run) == digests(plain)
    assert sorted(JournalReader(run.run.journal).index.groups)[: 4 * steps] == list(range(4 * steps))
    assert {1.0, 3.0} <= set(run.metric("replicas"))
    assert max(run.metric("mismatch/probe")) < 1e-5
    assert max(run.metric("mismatch/abs_max")) < 1e-5
    assert [workers[f"replica {number}"].killed for number in range(3)] == [True] * 3
    assert (run.run.logs / "rewards.log").exists()


async def test_a_group_that_a_new_replica_did_not_come_to_is_formed_again(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaler, "_POLL_S", 0.05)
    monkeypatch.setattr("verst.weights.group.MEETING_S", 1.0)

    def spawn(name: str, factory: Any, *args: Any, gpus: float = 0, env: Any = None) -> HostWorker:
        kind = DeadWhenItJoins if name == "replica 1" else HostWorker
        return kind(name, Host(factory, *args))

    run = prepared(tmp_path, model, "run", steps=10_000)
    failed, grown = await scaled_in_turn(run, spawn, 2, 2)
    assert (failed.state, grown.state) == (State.FAILED, State.DONE)
    assert "replica 1 could not join: replica 1 died (pull)" in failed.lines
    assert max(run.metric("mismatch/probe")) < 1e-5
    assert max(run.metric("replicas")) == 2.0
