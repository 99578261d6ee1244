"""Snapshots in memory: what is complete, what is kept, who finds it again, and what a rank is restored from."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from verst.config.schema import Config
from verst.errors import CheckpointError
from verst.runtime import snapshots as module
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.snapshots import Snapshots
from verst.runtime.trainers import Trainers, TrainersLost
from verst.training import snapshots as holding
from verst.training.checkpoints import CheckpointWriter, FileRecord, rank_name
from verst.training.snapshots import KEPT, SnapshotHolder, load_snapshot
from verst.training.state import RankState


def state(value: float) -> RankState:
    return RankState({"model/w": torch.full((8,), value), "exp_avg/w": torch.zeros(8)}, {"update": int(value)}, {})


def written(directory: Path, step: int, rank: int = 0, world: int = 1, value: float | None = None) -> FileRecord:
    writer = CheckpointWriter(directory, step, rank=rank, world=world)
    writer.begin(state(step if value is None else value))
    return writer.finish()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the machine's shared memory."""
    for owner in ("verst.weights.location", "verst.training.snapshots"):
        monkeypatch.setattr(f"{owner}.shared_memory", lambda: tmp_path)
    return tmp_path


def test_the_newest_two_are_kept_and_come_back_bit_for_bit(memory: Path):
    directory = memory / "verst-run.rank0"
    holder = SnapshotHolder(str(directory))
    holder.open()
    for step in (1, 2, 3):
        assert holder.confirm(step, written(directory, step))
    assert holder.steps() == {rank_name(0, 1): [2, 3]}
    assert KEPT == 2
    found = load_snapshot(directory, 3, rank=0, world=1)
    assert torch.equal(found.tensors["model/w"], torch.full((8,), 3.0))
    assert found.values == {"update": 3}
    holder.close()
    assert not directory.exists(), "its memory is given back"


def test_what_is_not_confirmed_is_not_there(memory: Path):
    directory = memory / "verst-run.rank0"
    holder = SnapshotHolder(str(directory))
    holder.open()
    written(directory, 1)
    assert holder.steps() == {}
    with pytest.raises(CheckpointError, match="no complete snapshot"):
        load_snapshot(directory, 1, rank=0, world=1)
    holder.confirm(2, written(directory, 2))
    assert not list(directory.glob("step-00000001*")), "what a rank left that died while it wrote"
    holder.close()


def test_a_flipped_bit_is_found(memory: Path):
    directory = memory / "verst-run.rank0"
    holder = SnapshotHolder(str(directory))
    holder.open()
    record = written(directory, 1)
    holder.confirm(1, record)
    file = directory / "step-00000001" / record.name
    spoiled = bytearray(file.read_bytes())
    spoiled[-3] ^= 4
    file.write_bytes(spoiled)
    with pytest.raises(CheckpointError, match="is corrupt"):
        load_snapshot(directory, 1, rank=0, world=1)
    holder.close()


def let_go(directory: Path) -> None:
    """The lock of a holder, as its death would."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").endswith(f"{directory.name}/owner.lock"):
                fcntl.flock(int(number), fcntl.LOCK_UN)


def test_a_holder_takes_up_what_another_has_left(memory: Path):
    """The memory outlives the process: here the lock of the first is let go as its death would."""
    directory = memory / "verst-run.rank0"
    first, second = SnapshotHolder(str(directory)), SnapshotHolder(str(directory))
    first.open()
    first.open()  # by a loop that adopts it
    first.confirm(1, written(directory, 1))
    let_go(directory)
    second.open()
    assert second.steps() == {rank_name(0, 1): [1]}
    assert second.confirm(1, FileRecord(**json.loads((directory / "step-00000001" / f"{rank_name(0, 1)}.json").read_text())))
    second.close()


async def test_a_copy_on_another_machine_brings_it_back(memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holding, "_CHUNK_BYTES", 100)  # in pieces
    here, there = SnapshotHolder(str(memory / "verst-run.rank0")), SnapshotHolder(str(memory / "verst-run.rank1"))
    here.open()
    there.open()
    record = written(memory / "verst-run.rank0", 4, rank=0, world=2)
    here.confirm(4, record)
    there.confirm(4, written(memory / "verst-run.rank1", 4, rank=1, world=2))
    await there.fetch(LocalWorker("holder 0", here), 4, record)
    assert there.steps() == {rank_name(rank, 2): [4] for rank in range(2)}
    assert asdict(there.record(4, record.name)) == asdict(record)
    here.close()  # with its machine
    new = SnapshotHolder(str(memory / "verst-run.rank0"))
    new.open()
    await new.fetch(LocalWorker("holder 1", there), 4, record)
    assert torch.equal(load_snapshot(memory / "verst-run.rank0", 4, rank=0, world=2).tensors["model/w"], torch.full((8,), 4.0))
    there.close()
    new.close()


class Ranks:
    """Trainers of two ranks, whose state is a number."""

    ranks = 2

    def __init__(self, nodes: list[str]) -> None:
        self.where, self.value, self.lost = nodes, 0, False
        self.restored: list[tuple[int, int]] = []  # (step, value)
        self._writers: list[CheckpointWriter] = []

    async def nodes(self) -> list[str]:
        return list(self.where)

    async def snapshot(self, directories: list[str], step: int) -> dict[str, Any]:
        self._writers = [CheckpointWriter(Path(d), step, rank=rank, world=2) for rank, d in enumerate(directories)]
        for writer in self._writers:
            writer.begin(state(self.value))
        return {}

    async def written(self, directories: list[str]) -> list[FileRecord]:
        if self.lost:
            raise TrainersLost("rank 1 died")
        return [await asyncio.to_thread(writer.finish) for writer in self._writers]

    async def restore_snapshot(self, directories: list[str], step: int) -> None:
        found = {int(load_snapshot(Path(d), step, rank=rank, world=2).values["update"]) for rank, d in enumerate(directories)}
        (self.value,) = found
        self.restored.append((step, self.value))

    async def publish(self, version: int, location: str | None, probe_T: Any) -> Any:
        class Manifest:
            digest = str(self.value)

        class Published:
            manifest = Manifest

        return Published


class Holders:
    """Starts them, on machines with memory of their own, and lets them die."""

    def __init__(self, memory: Path) -> None:
        self.memory, self.begun, self.dead = memory, list[tuple[int, str]](), set[int]()
        self._all: list[SnapshotHolder] = []  # a process that dies does not clean up, as an object does that is collected

    def spawn(self, rank: int, node: str) -> LocalWorker:
        self.begun.append((rank, node))
        self.dead.discard(rank)
        holders, holder = self, SnapshotHolder(str(self.memory / f"verst-run.rank{rank}"))
        self._all.append(holder)

        class Mortal(LocalWorker):
            async def call(self, method: str, /, *args: Any) -> Any:
                if rank in holders.dead:
                    raise WorkerDied(f"{self.name} died ({method})")
                return await super().call(method, *args)

        return Mortal(f"snapshot holder {rank}", holder)


def snapshots_config(**checkpoint: Any) -> Config:
    return Config.model_validate({"run": {"steps": 1}, "model": {"path": "m"}, "train": {"ranks": 2}, "checkpoint": checkpoint})


def kept(memory: Path, nodes: list[str], **checkpoint: Any) -> tuple[Snapshots, Ranks, Holders, list[str]]:
    config = snapshots_config(**checkpoint)
    ranks, holders, notes = Ranks(nodes), Holders(memory), list[str]()
    return Snapshots(config, "run", cast(Trainers, ranks), holders.spawn, notes.append), ranks, holders, notes


async def commit(snapshots: Snapshots, ranks: Ranks, step: int) -> None:
    ranks.value = step
    await snapshots.after_commit(step, str(step))
    assert snapshots._completing is not None
    await snapshots._completing


@pytest.fixture(autouse=True)
def _always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE", 1e9)


async def test_all_ranks_are_restored_to_the_newest_step_that_all_have(memory: Path):
    snapshots, ranks, _, notes = kept(memory, ["a", "a"])
    await snapshots.start()
    for step in (1, 2, 3):
        await commit(snapshots, ranks, step)
    ranks.lost = True
    await snapshots.after_commit(4, "4")  # written by one rank, and the other died: complete on none
    assert await snapshots.restore(4) == 3
    assert await snapshots.restore(2) == 2
    assert await snapshots.restore(3, newer_than=3) is None
    assert ranks.restored == [(3, 3), (2, 2)]
    assert notes == []
    await snapshots.close()
    assert os.listdir(memory) == []


async def test_a_holder_that_died_is_replaced_and_its_snapshots_are_still_there(memory: Path, monkeypatch: pytest.MonkeyPatch):
    snapshots, ranks, holders, notes = kept(memory, ["a", "a"])
    await snapshots.start()
    await commit(snapshots, ranks, 1)
    holders.dead.add(1)
    monkeypatch.setattr(SnapshotHolder, "_adopt", lambda self: True)  # the lock of a process that died is free
    await commit(snapshots, ranks, 2)
    assert holders.begun == [(0, "a"), (1, "a"), (1, "a")]
    assert notes == ["snapshot holder 1 died (confirm): another snapshot holder takes its place"]
    assert await snapshots.restore(2) == 2


async def test_a_holder_that_died_since_its_last_snapshot_keeps_no_memory_after_the_run(memory: Path):
    snapshots, ranks, holders, notes = kept(memory, ["a", "a"])
    await snapshots.start()
    await commit(snapshots, ranks, 1)
    holders.dead.add(1)
    let_go(memory / "verst-run.rank1")
    await snapshots.close()
    assert os.listdir(memory) == []
    assert notes == ["snapshot holder 1 died (open): another snapshot holder takes its place"]


async def test_a_machine_that_is_lost_takes_no_snapshot_with_it(memory: Path):
    snapshots, ranks, holders, _ = kept(memory, ["a", "b"])
    await snapshots.start()
    await commit(snapshots, ranks, 5)
    shutil.rmtree(memory / "verst-run.rank1")  # with the machine b
    ranks.where = ["a", "c"]
    assert await snapshots.restore(5) == 5
    assert ranks.restored == [(5, 5)]
    assert holders.begun == [(0, "a"), (1, "b"), (1, "c")]


async def test_a_rank_that_moves_leaves_nothing_on_its_former_machine(memory: Path):
    """Which lives: Ray has started its process elsewhere."""
    snapshots, ranks, holders, _ = kept(memory, ["a", "b"])
    await snapshots.start()
    await commit(snapshots, ranks, 5)
    ranks.where = ["a", "c"]
    spawn, left = holders.spawn, list[str]()

    def elsewhere(rank: int, node: str) -> LocalWorker:
        left.extend(path.name for path in memory.glob("verst-run.rank1"))
        return spawn(rank, node)

    snapshots._spawn = elsewhere
    assert await snapshots.restore(5) == 5
    assert left == []
    assert ranks.restored == [(5, 5)], "from the copy on a"
    await snapshots.close()


async def test_a_machine_that_is_lost_with_the_loop_takes_no_snapshot_with_it(memory: Path, monkeypatch: pytest.MonkeyPatch):
    """The next loop knows neither which machine the rank was on, nor who was its buddy: here both ranks are on one now."""
    monkeypatch.setattr(SnapshotHolder, "_adopt", lambda self: Path(self._directory).exists())  # the locks of processes that died are free
    snapshots, ranks, holders, _ = kept(memory, ["a", "b"])
    await snapshots.start()
    await commit(snapshots, ranks, 5)
    shutil.rmtree(memory / "verst-run.rank1")
    again = Snapshots(snapshots_config(), "run", cast(Trainers, ranks), holders.spawn, lambda line: None)
    ranks.where = ["a", "a"]
    await again.start()
    assert await again.restore(5) == 5
    assert ranks.restored == [(5, 5)]


async def test_a_snapshot_of_other_weights_than_were_committed_is_left_out(memory: Path):
    snapshots, ranks, _, notes = kept(memory, ["a", "a"])
    await snapshots.start()
    await commit(snapshots, ranks, 1)
    ranks.value = 7  # a bit has flipped before the copy was made
    await snapshots.after_commit(2, "2")
    assert snapshots._completing is not None
    await snapshots._completing
    assert await snapshots.restore(2) == 1
    assert notes == ["warning: snapshot of step 2 skipped: its weights hash is 7, not 2 as committed"]


async def test_they_are_taken_as_often_as_a_share_of_the_time_allows(memory: Path, monkeypatch: pytest.MonkeyPatch):
    snapshots, ranks, _, _ = kept(memory, ["a", "a"])
    await snapshots.start()
    now, taken = [100.0], list[int]()
    monkeypatch.setattr(module, "SHARE", 0.03)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    snapshot = ranks.snapshot

    async def costly(directories: list[str], step: int) -> dict[str, Any]:
        taken.append(step)
        now[0] += 0.5
        return await snapshot(directories, step)

    ranks.snapshot = costly  # type: ignore[method-assign]
    for step in range(1, 21):
        now[0] += 5.0
        await snapshots.after_commit(step, str(step))
        assert snapshots._completing is not None
        await snapshots._completing
    assert taken == [1, 5, 9, 13, 17], "0.5 s of every 16.7 s or more"


async def test_without_room_the_run_goes_on_and_says_what_it_lacks(memory: Path):
    snapshots, ranks, _, notes = kept(memory, ["a", "a"])
    await snapshots.start()

    async def full(directories: list[str]) -> list[FileRecord]:
        raise CheckpointError("no space left")

    ranks.written = full  # type: ignore[method-assign]
    await commit(snapshots, ranks, 1)
    await snapshots.after_commit(2, "2")
    assert await snapshots.restore(2) is None
    assert notes == [
        "warning: no more snapshots in memory, a lost trainer rank is restored from the last checkpoint on disk: no space left",
    ]


async def test_they_may_be_switched_off(memory: Path):
    snapshots, ranks, holders, notes = kept(memory, ["a", "a"], snapshots=False)
    await snapshots.start()
    await snapshots.after_commit(1, "1")
    assert (holders.begun, await snapshots.restore(1), notes, ranks.restored) == ([], None, [], [])
