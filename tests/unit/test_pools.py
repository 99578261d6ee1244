"""All trainer ranks as one: a rank that a collective holds neither delays a failure nor survives the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from verst.config.schema import Config
from verst.errors import CheckpointError, DeadlineExceeded, EngineFailure
from verst.runtime import pools
from verst.runtime.pools import Trainers


class Rank:
    """A worker whose calls do what `does` says, by method."""

    def __init__(self, number: int, **does: Callable[[], Any]) -> None:
        self.name = f"trainer rank {number}"
        self.killed = False
        self._does = does

    async def call(self, method: str, /, *args: Any) -> Any:
        return await self._does[method]()

    post = call

    def kill(self) -> None:
        self.killed = True


async def answers() -> str:
    return "done"


async def hangs() -> None:
    await asyncio.sleep(60)


async def dies() -> None:
    raise EngineFailure("trainer rank 1 died")


def trainers(*ranks: Rank) -> Trainers:
    return Trainers(ranks, Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}}), put=lambda encoded: encoded)


async def test_a_rank_that_dies_is_told_without_waiting_for_its_peers(monkeypatch: pytest.MonkeyPatch):
    ranks = Rank(0, optimizer_step=hangs), Rank(1, optimizer_step=dies)
    assert pools.GRACE_S == 10
    monkeypatch.setattr(pools, "GRACE_S", 0.05)
    with pytest.raises(EngineFailure, match=r"trainer rank 1 died \(trainer rank 0: optimizer_step: no answer within 0\.05 s after that\)"):
        await asyncio.wait_for(trainers(*ranks).optimizer_step(0), 5)


async def test_every_process_ends_with_the_run(monkeypatch: pytest.MonkeyPatch):
    assert pools._CLOSE_S == 30
    monkeypatch.setattr(pools, "_CLOSE_S", 0.05)
    ranks = Rank(0, close=hangs), Rank(1, close=answers)
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for trainer rank 0: close"):
        await asyncio.wait_for(trainers(*ranks).close(), 5)
    assert [rank.killed for rank in ranks] == [True, True]


async def test_a_checkpoint_that_failed_on_one_rank_waits_for_what_the_others_still_write(monkeypatch: pytest.MonkeyPatch):
    """Its directory is removed afterwards."""
    ended: list[str] = []

    async def writes() -> None:
        await asyncio.sleep(0.2)
        ended.append("trainer rank 0")

    async def full() -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(pools, "GRACE_S", 0.01)
    with pytest.raises(CheckpointError, match=r"^no space left$"):
        await trainers(Rank(0, written=writes), Rank(1, written=full)).written()
    assert ended == ["trainer rank 0"]
