"""What a new version does to the groups that a replica has in flight (`weights.in_flight`)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.loop.fakes import group
from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import DeadlineExceeded
from verst.runtime.extensions import Extensions
from verst.runtime.pools import Replicas
from verst.runtime.rollout_worker import RolloutWorker
from verst.types import Group, Message, PauseMode, Prompt
from verst.weights.files import publish

PROBE_T = np.array([1, 2], np.int32)
PROMPT = Prompt("p", (Message("user", "q"),))


def config(in_flight: str, **weights: Any) -> Config:
    return load_config(
        {
            "run": {"steps": 1},
            "model": {"path": "m"},
            "train": {"groups_per_step": 2},
            "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
            "rollout": {"capacity_groups": 4, "deadline_s": 5.0},
            "weights": {"in_flight": in_flight, "deadline_s": 5.0, **weights},
        }
    )


class Parts:
    """Roller, scorer and engine of a replica at once. Groups finish when they are let."""

    version = 0

    def __init__(self) -> None:
        self.events: list[str] = []
        self.let = asyncio.Event()

    async def roll(self, seq: int, prompt: Prompt, deadline_s: float) -> Group:
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
    worker.engine, worker._rollers, worker._scorer = parts, {False: parts}, cast(Any, parts)

    async def call(method: str, *args: Any) -> Any:
        return await getattr(worker, method)(*args)

    return parts, worker, Replicas([cast(Any, SimpleNamespace(name="replica 0", call=call, post=call))], cfg, shared=shared)


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


async def test_a_group_that_never_finishes_is_told(monkeypatch: pytest.MonkeyPatch):
    parts, worker, replicas = replica(config("finish"))
    rolling = asyncio.create_task(replicas.roll(1, PROMPT, "policy"))
    await begun(parts, 1)
    monkeypatch.setattr("verst.runtime.rollout_worker.drain_limit_s", lambda config: 0.05)
    with pytest.raises(DeadlineExceeded, match="1 groups to finish before a new version"):
        async with replicas.drained():
            pass
    parts.let.set()
    await rolling
    await worker.admit()
