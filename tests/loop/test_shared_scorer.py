"""One reward process for all replicas."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from tests.loop.local import local_run, prompts_file
from verst.config.schema import RewardConfig
from verst.errors import ExtensionError, RewardFailure
from verst.journal.log import JournalReader
from verst.rewards.spec import RewardSpec
from verst.runtime import shared_scorer
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.shared_scorer import ScorerHost, SharedScorer
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

LENGTH = "tests.loop.rewards:length"


def group(*texts: str) -> Group:
    arrays = np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32)
    made = (
        Trajectory(f"0/{i}", *arrays, (Turn(0, 0, 1, FinishReason.STOP, text),), (Message("assistant", text),), Status.FINISHED, 0)
        for i, text in enumerate(texts)
    )
    return Group(0, Prompt("p:0", (), {"answer": "22"}), tuple(made), 0)


def scorer(log: Path, function: str = "exact_match", **options: Any) -> SharedScorer:
    reward = RewardConfig(function=function, options=options, actor_gpus=0)
    return SharedScorer(reward, RewardSpec.of(reward), log)


def rewards(scored: Group) -> list[float | None]:
    return [trajectory.reward for trajectory in scored.trajectories]


async def test_without_ray_it_scores_here_and_leaves_no_process(tmp_path: Path):
    before = set(psutil.Process().children(recursive=True))
    one = scorer(tmp_path / "rewards.log")
    await one.start()
    assert rewards(await one.score(group("22", "23"))) == [1.0, 0.0]
    one.close()
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_what_cannot_be_loaded_is_told_at_the_start(tmp_path: Path):
    one = scorer(tmp_path / "rewards.log", "no_such_module:function")
    with pytest.raises(ExtensionError, match="no_such_module"):
        await one.start()


class Dying(LocalWorker):
    """Its first calls find it dead."""

    deaths = 0

    async def post(self, method: str, /, *args: Any) -> Any:
        if Dying.deaths:
            Dying.deaths -= 1
            raise WorkerDied("killed on purpose")
        return await super().post(method, *args)


@pytest.mark.parametrize(("deaths", "survives"), [(2, True), (3, False)])
async def test_a_group_whose_process_died_is_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, survives: bool):
    monkeypatch.setattr(shared_scorer, "LocalWorker", Dying)
    monkeypatch.setattr(Dying, "deaths", deaths)
    one = scorer(tmp_path / "rewards.log")
    await one.start()
    try:
        if survives:
            assert rewards(await one.score(group("22"))) == [1.0]
        else:
            with pytest.raises(RewardFailure, match="died 3 times while it scored group 0: killed on purpose"):
                await one.score(group("22"))
    finally:
        one.close()


async def test_one_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_scorer, "_ASKED_S", 0.01)
    monkeypatch.setattr(shared_scorer, "_SILENCE_S", 0.05)
    ended: list[str] = []

    class Stuck(LocalWorker):
        async def call(self, method: str, /, *args: Any) -> Any:
            await asyncio.sleep(60)

        async def post(self, method: str, /, *args: Any) -> Any:
            await asyncio.sleep(60)

        async def ping(self) -> None:
            await asyncio.sleep(60)

        def kill(self) -> None:
            ended.append(self.name)

    with pytest.raises(WorkerDied, match=r"waited 0\.05 s for the shared reward to answer"):
        await shared_scorer._answer(Stuck("the shared reward", None), b"")
    assert ended == ["the shared reward"]


async def test_a_whole_run_is_scored_by_it(tmp_path: Path, model: Path):
    values = {"reward": {"function": "exact_match", "actor_gpus": 0}, "data": {"path": prompts_file(tmp_path)}, "run": {"steps": 1}}
    run = await local_run(tmp_path, model, values).go()
    journal = JournalReader(run.run.journal, run.run.run_id)
    assert all(t.reward is not None for seq in journal.batch(1).groups for t in journal.group(seq).trajectories)


class Replica:
    """As a replica uses it, in an actor of its own."""

    def __init__(self, log: str) -> None:
        self._one = scorer(Path(log))

    async def start(self) -> None:
        await self._one.start()

    async def score(self, text: str) -> list[float | None]:
        return rewards(await self._one.score(group(text)))

    async def pid(self) -> int:
        return (await (await self._one._found()).where()).pid

    async def leave(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_replicas_share_one_process_and_survive_its_death_and_that_of_its_owner(tmp_path: Path):
    get: Any = ray.get
    made: Any = ray.remote(Replica).options(num_cpus=0, max_concurrency=10)
    first, second = (made.remote(str(tmp_path / "rewards.log")) for _ in range(2))
    get(first.start.remote())
    get(second.start.remote())
    pid = get(first.pid.remote())
    assert get(second.pid.remote()) == pid
    assert get([first.score.remote("22"), second.score.remote("23")]) == [[1.0], [0.0]]
    os.kill(pid, signal.SIGKILL)
    assert get([first.score.remote("22"), second.score.remote("22")], timeout=60) == [[1.0], [1.0]]
    shared = {get(replica.pid.remote()) for replica in (first, second)}
    assert len(shared) == 1
    first.leave.remote()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(p) for p in shared) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert get(second.score.remote("22"), timeout=60) == [1.0]


def test_the_host_starts_once(tmp_path: Path):
    async def both() -> None:
        reward = RewardConfig(function="exact_match", actor_gpus=0)
        host = ScorerHost(reward, RewardSpec.of(reward), tmp_path / "rewards.log", ())
        await asyncio.gather(host.start(), host.start())
        found = len(host._scorer.pids)
        host.close()
        assert found == 1

    asyncio.run(both())
