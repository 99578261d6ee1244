"""What a loop finds that starts where another one died."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.loop.fakes import group
from tests.unit.test_trajectory_branches import sequence
from verst.journal.codec import encode_group
from verst.journal.log import Journal
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, PublishRecord
from verst.rollout.recorded import Piece
from verst.runtime import adoption, kept
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.adoption import adopt_replicas, complete, keep_finished, still_in_flight
from verst.runtime.kept import KeptHost
from verst.runtime.rollout_worker import Adopted
from verst.types import Branch, FinishReason, Generation


class Left(LocalWorker):
    """A replica that an earlier loop has left. `says` is what it answers, or raises; None: it does not answer."""

    def __init__(self, number: int, says: Adopted | Exception | None) -> None:
        super().__init__(f"replica {number}", None)
        self.killed, self._says = False, says

    async def call(self, method: str, /, *args: Any) -> Any:
        assert method == "adopt"
        if self._says is None:
            await asyncio.sleep(60)
        if isinstance(self._says, Exception):
            raise self._says
        return self._says

    def kill(self) -> None:
        self.killed = True


async def test_those_that_live_are_adopted_and_the_others_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adoption, "_ANSWER_S", 0.05)
    left = {
        0: Left(0, WorkerDied("replica 0 died")),
        1: Left(1, None),
        2: Left(2, Adopted(2, True, (b"a",), {})),
        3: Left(3, Adopted(0, False, (), {})),  # in the middle of its start
        5: Left(5, Adopted(1, True, (b"b", b"c"), {})),
    }
    adopted, had = await adopt_replicas(left, 3)
    assert [(replica.number, replica.slot, replica.started) for replica in adopted] == [(2, 2, True), (5, 1, True)]
    assert sorted(group for one in had for group in one.finished) == [b"a", b"b", b"c"]
    assert {number for number, worker in left.items() if worker.killed} == {0, 1, 3}
    begun: list[tuple[int, int]] = []

    def spawn(number: int, slot: int) -> LocalWorker:
        begun.append((number, slot))
        return LocalWorker(f"replica {number}", None)

    members = complete(adopted, 3, spawn)
    assert begun == [(6, 0)], "the slot that is free, and a number that nobody had"
    assert sorted(replica.slot for replica in members) == [0, 1, 2]


async def test_fewer_are_adopted_if_fewer_are_wanted():
    left = {number: Left(number, Adopted(number, True, (b"x",), {})) for number in range(3)}
    adopted, had = await adopt_replicas(left, 1)
    assert [replica.number for replica in adopted] == [2]
    assert [worker.killed for worker in left.values()] == [True, True, False]
    assert len(had) == 3, "also of those that are not needed any more"
    assert complete(adopted, 1, lambda number, slot: pytest.fail("none is missing")) == adopted


def test_a_run_without_an_earlier_loop_begins_with_its_own(tmp_path: Path):
    members = complete([], 2, lambda number, slot: LocalWorker(f"replica {number} in {slot}", None))
    assert [(replica.number, replica.slot, replica.name, replica.started) for replica in members] == [
        (0, 0, "replica 0 in 0", False),
        (1, 1, "replica 1 in 1", False),
    ]


def test_finished_groups_go_into_the_journal_once_and_only_of_versions_that_were_compared(tmp_path: Path):
    journal = Journal.create(tmp_path / "journal", "run")
    for seq in range(4):
        journal.append_admitted(AdmitRecord(seq, f"p{seq}", 0))
    journal.append_published(PublishRecord(0, "hash", (0,)))
    journal.append_group(0, encode_group(group(0, 0)))
    found = [encode_group(group(seq, version)) for seq, version in ((0, 0), (1, 0), (2, 1), (9, 0), (1, 0))]
    known, late = group(3, 0), sequence("..x", version=1)  # of version 1 in a branch alone
    found.append(encode_group(replace(known, trajectories=(replace(known.trajectories[0], branches=(Branch(**late),)),))))
    assert keep_finished(journal, [Adopted(0, True, (one,), {}) for one in found]) == 1
    assert list(journal.index.groups) == [0, 1], "not twice, not of version 1, which no engine serves yet, not one that was never admitted"


def test_tokens_in_flight_are_kept_of_groups_that_are_still_to_come_and_of_versions_that_were_compared(tmp_path: Path):
    def piece(name: str, *versions: int) -> Piece:
        zeros = np.zeros(len(versions))
        return Piece(
            "", Generation(name, zeros.astype(np.int32), zeros.astype(np.float32), np.array(versions, np.int32), FinishReason.ABORT)
        )

    journal = Journal.create(tmp_path / "journal", "run")
    for seq in range(3):
        journal.append_admitted(AdmitRecord(seq, f"p{seq}", 0))
    journal.append_published(PublishRecord(0, "hash", (0,)))
    journal.append_group(0, encode_group(group(0, 0)))
    journal.append_batch(BatchRecord(1, (0,), {}))
    journal.append_commit(CommitRecord(1, "hash"))
    journal.append_published(PublishRecord(1, "hash", (0,)))
    old, mixed, new = piece("1/0/0", 0), piece("1/1/0", 0, 1, 1), piece("1/2/0", 1, 2)
    had = [Adopted(0, True, (), {0: [old], 1: [old, mixed, new]}), Adopted(1, True, (), {2: [new], 9: [old]})]
    assert still_in_flight(journal, had) == {1: [old, mixed], 2: []}


async def test_a_process_that_everyone_has_forgotten_ends_itself(monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    gone = asyncio.Event()

    def end(code: int) -> None:
        ended.append(code)
        gone.set()

    class Works:
        async def long(self) -> str:
            await asyncio.sleep(0.4)
            return "done"

    monkeypatch.setattr(kept, "ORPHAN_S", 0.2)
    monkeypatch.setattr(kept.os, "_exit", end)
    host = KeptHost(Works)
    assert await host.call("long") == "done"
    assert not ended, "it works: it is not forgotten, though nobody asks"
    for _ in range(4):
        await asyncio.sleep(0.1)
        await host.where()
    assert not ended, "a loop asks where its workers are"
    await asyncio.wait_for(gone.wait(), 5)
    assert ended == [1]
