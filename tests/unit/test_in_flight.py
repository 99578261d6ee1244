"""What a new version does to the groups that a replica has in flight (`weights.in_flight`)."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.loop.fakes import group
from verst.config.load import load_config
from verst.config.schema import Config
from verst.data.chat import ChatRenderer
from verst.errors import EngineFailure, WeightMismatch
from verst.journal.codec import decode_group
from verst.rollout.environments import SingleTurn
from verst.runtime.extensions import Extensions
from verst.runtime.pools import Replicas
from verst.runtime.replica import fresh
from verst.runtime.rollout_worker import RolloutWorker
from verst.testing import FakeEngine, FakeEnvironment, tiny_tokenizer
from verst.types import Group, Message, PauseMode, Prompt, Reply, Status, TensorEntry
from verst.weights.files import publish

PROBE_T = np.array([1, 2], np.int32)
TOKENIZER: Any = tiny_tokenizer()
END: int = TOKENIZER.eos_token_id
PROMPT = Prompt("p", (Message("user", "q"),))


def config(in_flight: str, rollout: dict[str, Any] | None = None, **weights: Any) -> Config:
    return load_config(
        {
            "run": {"steps": 1},
            "model": {"path": "m"},
            "train": {"groups_per_step": 2},
            "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
            "rollout": rollout or {"capacity_groups": 4, "deadline_s": 5.0},
            "weights": {"in_flight": in_flight, "deadline_s": 5.0, **weights},
        }
    )


class Parts:
    """Roller, scorer and engine of a replica at once. Groups finish when they are let."""

    version = 0

    def __init__(self) -> None:
        self.events: list[str] = []
        self.let = asyncio.Event()

    async def roll(self, seq: int, prompt: Prompt, deadline_s: float, recorded: Any) -> Group:
        self.events.append(f"begin {seq}")
        await self.let.wait()
        self.events.append(f"end {seq}")
        return group(seq, 0)

    async def score(self, scored: Group) -> Group:
        return scored

    async def pause(self, mode: PauseMode) -> None:
        self.events.append(f"pause {mode.value}")

    async def update_weights(self, update: Any) -> dict[str, str]:
        return {}

    async def resume(self) -> None:
        self.events.append("resume")

    async def logprobs(self, tokens_T: Any) -> Any:
        return tokens_T

    def stats(self) -> dict[str, float]:
        return {}


def replica(cfg: Config, *, shared: bool = False) -> tuple[Parts, RolloutWorker, Replicas]:
    parts, worker = Parts(), RolloutWorker(cfg, Extensions(), 0, "cpu", Path("unused"))
    worker.engine, worker._rollers, worker._scorer = parts, {"policy": parts}, cast(Any, parts)

    async def call(method: str, *args: Any) -> Any:
        return await getattr(worker, method)(*args)

    only = SimpleNamespace(name="replica 0", call=call, post=call, kill=lambda: None)
    return parts, worker, Replicas(fresh([cast(Any, only)]), cfg, shared=shared)


async def begun(parts: Parts, seq: int) -> None:
    async with asyncio.timeout(5):
        while f"begin {seq}" not in parts.events:  # noqa: ASYNC110 - a list has no events
            await asyncio.sleep(0.001)


async def test_a_version_waits_until_all_have_finished_and_later_ones_wait_for_it(tmp_path: Path):
    parts, _, replicas = replica(config("finish"))
    early = asyncio.create_task(replicas.roll(1, PROMPT, "policy"))
    await begun(parts, 1)

    async def bring() -> None:
        async with replicas.drained():
            await replicas.pull(publish(1, iter(()), tmp_path), PROBE_T)

    bringing = asyncio.create_task(bring())
    await asyncio.sleep(0.02)
    late = asyncio.create_task(replicas.roll(2, PROMPT, "policy"))
    await asyncio.sleep(0.02)
    assert parts.events == ["begin 1"]
    parts.let.set()
    await asyncio.wait_for(asyncio.gather(early, bringing, late), 5)
    assert parts.events == ["begin 1", "end 1", "pause in_place", "resume", "begin 2", "end 2"]


@pytest.mark.parametrize(("in_flight", "mode"), [("keep", "in_place"), ("recompute", "retract")])
async def test_or_it_comes_at_once(tmp_path: Path, in_flight: str, mode: str):
    parts, _, replicas = replica(config(in_flight))
    rolling = asyncio.create_task(replicas.roll(1, PROMPT, "policy"))
    await begun(parts, 1)
    async with replicas.drained():
        await replicas.pull(publish(1, iter(()), tmp_path), PROBE_T)
    assert parts.events == ["begin 1", f"pause {mode}", "resume"]
    parts.let.set()
    await rolling


async def test_on_shared_devices_nothing_can_finish_while_a_version_comes():
    """The engine is paused since the trainer's turn began: to wait for its groups would be to wait for the deadline."""
    parts, _, replicas = replica(config("finish"), shared=True)
    rolling = asyncio.create_task(replicas.roll(1, PROMPT, "policy"))
    await begun(parts, 1)
    async with asyncio.timeout(2):
        async with replicas.drained():
            assert parts.events == ["begin 1"]
    parts.let.set()
    await rolling


class Places(FakeEngine):
    """So many requests at a time; the others wait in the order in which they came."""

    def __init__(self, places: int, **options: Any) -> None:
        super().__init__([[END]], **options)
        self._places = asyncio.Semaphore(places)
        self.update_s = 0.0

    async def generate(self, request: Any) -> Any:
        async with self._places:
            return await super().generate(request)

    async def update_weights(self, update: Any) -> Any:
        await asyncio.sleep(self.update_s)
        return await super().update_weights(update)


def rolls(engine: FakeEngine, cfg: Config, environment: Any = SingleTurn) -> RolloutWorker:
    """A replica whose groups are rolled as in a run, and not scored."""
    worker = RolloutWorker(cfg, Extensions(), 0, "cpu", Path("unused"))
    worker.engine, worker._renderer, worker._environment = engine, ChatRenderer(TOKENIZER), environment
    worker._rollers = {"policy": worker._roller()}
    worker._scorer = cast(Any, Parts())
    return worker


async def rolled(worker: RolloutWorker, *seqs: int) -> list[Group]:
    return [decode_group(encoded) for encoded in await asyncio.gather(*(worker.roll(seq, PROMPT, "policy") for seq in seqs))]


async def test_a_pull_that_takes_longer_than_a_trajectory_may_fails_none_and_ends_no_run(tmp_path: Path):
    engine = Places(2, tick_s=0.05)
    engine.update_s = 1.2
    worker = rolls(engine, config("keep", rollout={"capacity_groups": 4, "group_size": 2, "max_running": 2, "deadline_s": 0.25}))
    rolling = asyncio.create_task(rolled(worker, 0, 1, 2))  # some begin to be generated, others wait for a place
    await asyncio.sleep(0.02)
    assert len(engine.requests) == 2
    await worker.pull(publish(1, iter(()), tmp_path), PROBE_T)
    assert {t.status for g in await rolling for t in g.trajectories} == {Status.FINISHED}
    assert len((await rolling)[2].trajectories) == 2


async def test_deadlines_stand_still_on_shared_devices_until_a_version_serves(tmp_path: Path):
    """Also where the first attempt to bring it fails: the engine stays paused."""
    engine = Places(2, tick_s=0.05)
    worker = rolls(engine, config("keep", rollout={"capacity_groups": 4, "group_size": 2, "max_running": 2, "deadline_s": 0.3}))
    rolling = asyncio.create_task(rolled(worker, 0))
    await asyncio.sleep(0.02)
    await worker.release_memory()
    await asyncio.sleep(0.4)
    wrong = replace(publish(1, iter(()), tmp_path), entries=(TensorEntry("scale", (1,), "float32", "no such", 4),))
    with pytest.raises(WeightMismatch):
        await worker.pull(wrong, PROBE_T)
    await asyncio.sleep(0.4)
    assert not rolling.done()
    await worker.pull(publish(1, iter(()), tmp_path / "again"), PROBE_T)
    assert {t.status for g in await rolling for t in g.trajectories} == {Status.FINISHED}


async def test_later_turns_have_the_time_of_the_groups_that_came_meanwhile():
    """Eight groups of eight for eight places: the second turn of the first group waits behind the first turns of all others."""
    rollout = {"capacity_groups": 8, "group_size": 8, "max_running": 8, "max_turns": 3, "deadline_s": 0.3}
    again = partial(FakeEnvironment, [Reply((Message("user", "more"),), done=False)] * 2 + [Reply()])
    worker = rolls(Places(8, tick_s=0.05), config("keep", rollout=rollout), again)
    groups = await rolled(worker, *range(8))
    assert [[t.status for t in g.trajectories].count(Status.FINISHED) for g in groups] == [8] * 8


async def test_samples_of_one_prompt_have_the_time_of_those_before_them():
    limits: list[float] = []

    async def roll(seq: int, prompt: Prompt, deadline_s: float, recorded: Any) -> Group:
        limits.append(deadline_s)
        return group(seq, 0)

    rollout = {"capacity_groups": 4, "max_running": 64, "deadline_s": 600.0}
    worker = RolloutWorker(config("keep", rollout=rollout), Extensions(), 0, "cpu", Path("unused"), samples=256)
    worker._rollers, worker._scorer = {"evaluation": SimpleNamespace(roll=roll)}, cast(Any, Parts())
    await asyncio.gather(*(worker.roll(seq, PROMPT, "evaluation") for seq in (0, 1)))
    assert limits == [5 * 600, 9 * 600]  # of 64 places: four rounds for each


async def test_a_group_that_was_given_up_holds_up_no_version_though_it_swallows_its_cancellation():
    parts, worker, _ = replica(config("finish"))
    deaf = asyncio.Event()

    async def roll(seq: int, prompt: Prompt, deadline_s: float, recorded: Any) -> Group:
        parts.events.append(f"begin {seq}")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await deaf.wait()
        raise EngineFailure("nobody asks for it any more")

    parts.roll = roll
    rolling = asyncio.create_task(worker.roll(1, PROMPT, "policy"))
    await begun(parts, 1)
    rolling.cancel()
    await asyncio.wait_for(worker.drain(), 2)
    assert rolling.cancelled()
    deaf.set()
    await asyncio.sleep(0)
    await worker.admit()


async def test_a_group_that_never_finishes_is_told(monkeypatch: pytest.MonkeyPatch):
    parts, worker, replicas = replica(config("finish"))
    rolling = asyncio.create_task(replicas.roll(1, PROMPT, "policy"))
    await begun(parts, 1)
    monkeypatch.setattr("verst.runtime.rollout_worker.drain_limit_s", lambda config: 0.05)
    async with replicas.drained():
        assert not replicas.members
    lost = await replicas.next_lost()
    assert "1 groups to finish before a new version" in str(lost.error)
    rolling.cancel()
    parts.let.set()
    await worker.admit()
