"""What is lost while a run starts is replaced with the limits of a later loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnschedulableError

from verst.config.schema import Config
from verst.errors import EngineFailure, ModelError
from verst.journal.log import Journal, JournalReader
from verst.runtime import revival, starting
from verst.runtime.actors import LocalWorker, WorkerDied, unwrapped
from verst.runtime.faults import Faults
from verst.runtime.lease import Lease
from verst.runtime.pools import Replicas
from verst.runtime.replica import Stage, fresh
from verst.runtime.revival import GivenUp, Losses
from verst.runtime.stacks import KeepStacks
from verst.runtime.starting import Starting
from verst.runtime.trainers import Trainers, TrainersLost


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(starting, "PAUSES_S", (0.0, 0.0, 0.0))


class Ranks:
    """Trainers that are lost in the calls that `lose` names, each once for each time it is named."""

    def __init__(self, *lose: str) -> None:
        self.lose, self.calls = list(lose), list[str]()

    def __getattr__(self, method: str) -> Any:
        async def call(**_: Any) -> list[str]:
            self.calls.append(method)
            if method in self.lose:
                self.lose.remove(method)
                raise TrainersLost(f"trainer rank 1 died ({method})")
            return ["trainer rank 1"]

        return call


class Mortal(LocalWorker):
    """A replica whose process dies in a method; or whose user made a mistake."""

    def __init__(self, number: int, dies_in: str | None = None, error: Exception | None = None) -> None:
        super().__init__(f"replica {number}", None)
        self.calls, self.killed = list[str](), False
        self._dies_in, self._error = dies_in, error or WorkerDied(f"{self.name} died ({dies_in})")

    async def call(self, method: str, /, *args: Any) -> Any:
        self.calls.append(method)
        if method == self._dies_in:
            raise self._error
        return {"weight_ranks": 1, "probe_tokens": f"tokens of {self.name}"}.get(method)

    def kill(self) -> None:
        self.killed = True


class Start:
    """Of a run with these ranks and replicas. `later` are those that replicas are replaced by."""

    def __init__(self, directory: Path, ranks: Ranks, *replicas: Mortal, later: list[Mortal] | None = None) -> None:
        self.config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}})
        self.ranks, self.later, self.begun = cast(Trainers, ranks), later or [], list[tuple[int, int]]()
        self.replicas = Replicas(fresh(replicas), self.config)
        self.notes: list[str] = []
        self.directory = directory
        self.journal = Journal.create(directory / "journal", "test-run")
        self.faults = faults = Faults(self.journal, self.notes.append)
        faults.hold()
        losses = Losses(faults, KeepStacks(lambda: [], directory), directory)
        self.starting = Starting(self.ranks, self.replicas, self._spawn, losses, faults, 0)

    def _spawn(self, number: int, slot: int) -> LocalWorker:
        self.begun.append((number, slot))
        return self.later.pop(0)

    async def go(self, *, shared: bool = False, again: bool = False) -> None:
        await Lease(self.config, self.ranks, self.replicas, shared=shared).start(True, self.starting, again=again)

    def recorded(self) -> tuple[list[str], list[str]]:
        """Who was lost, and who came back, as the journal has it."""
        reader = JournalReader(self.directory / "journal")
        assert (reader.faults(), reader.recoveries()) == ([], []), "recovery has not looked at the journal yet"
        self.faults.write_held()
        self.journal.close()
        reader = JournalReader(self.directory / "journal")
        return [fault.role for fault in reader.faults()], [back.role for back in reader.recoveries()]


@pytest.mark.parametrize("again", [False, True])
async def test_ranks_that_are_lost_are_brought_back(tmp_path: Path, again: bool):
    ranks = Ranks("start", "rebuild", "rebuild")
    start = Start(tmp_path, ranks, Mortal(0))
    await start.go(again=again)
    assert ranks.calls == (["rebuild"] * 3 if again else ["start", *["rebuild"] * 3])
    faults, recoveries = start.recorded()
    assert (faults, recoveries) == (["the trainers"] * (2 if again else 3), ["trainer rank 1"])
    assert start.notes[0] == f"the trainers were lost after step 0: trainer rank 1 died ({'rebuild' if again else 'start'})"


async def test_ranks_that_are_lost_again_and_again_end_the_run(tmp_path: Path):
    start = Start(tmp_path, Ranks("start", *["rebuild"] * 9), Mortal(0))
    with pytest.raises(GivenUp) as ended:
        await start.go()
    assert "the trainers were lost 4 times in the start of the run, which was begun again each time" in str(ended.value)
    assert f"verst resume {tmp_path}" in str(ended.value)


async def test_what_they_were_asked_for_is_done_again(tmp_path: Path):
    ranks = Ranks("restore")
    start = Start(tmp_path, ranks)
    assert await start.starting.surviving(start.ranks.restore) == ["trainer rank 1"]  # type: ignore[arg-type]
    assert ranks.calls == ["restore", "rebuild", "restore"]


@pytest.mark.parametrize("moment", ["start", "release_memory", "resume_memory"])
async def test_ranks_are_lost_where_devices_are_shared(tmp_path: Path, moment: str):
    """What comes before the replicas' start is done again, so that the device is theirs then."""
    ranks, replica = Ranks(moment), Mortal(0)
    await Start(tmp_path, ranks, replica).go(shared=True)
    again = [] if moment == "start" else [moment]
    calls = ["start", "release_memory", "resume_memory"]
    at = calls.index(moment) + 1
    assert ranks.calls == [*calls[:at], "rebuild", *again, *calls[at:]]
    assert replica.calls == ["start", "weight_ranks", "release_memory"]


@pytest.mark.parametrize("moment", ["start", "weight_ranks"])
async def test_a_replica_that_dies_is_replaced_in_its_place(tmp_path: Path, moment: str):
    members = Mortal(0), Mortal(1, moment)
    start = Start(tmp_path, Ranks(), *members, later=[Mortal(2, "start"), Mortal(3)])
    await start.go()
    assert start.begun == [(2, 1), (3, 1)], "the number is new, the place is that of the dead one"
    assert [(replica.name, replica.stage) for replica in start.replicas.active] == [
        ("replica 0", Stage.SERVING),
        ("replica 3", Stage.SERVING),
    ]
    assert (members[0].killed, members[1].killed) == (False, True)
    assert start.recorded() == (["replica 1", "replica 2"], ["replica 1"])
    assert start.notes[-1].startswith("replica 3 takes the place of replica 1, ")


async def test_one_that_dies_behind_its_start_is_replaced_when_it_is_asked(tmp_path: Path):
    first, second = Mortal(0, "probe_tokens"), Mortal(1)
    start = Start(tmp_path, Ranks(), first, later=[second])
    await start.go()
    assert await start.replicas.probe_tokens(cast(Any, None), start.starting) == "tokens of replica 1"
    assert second.calls == ["start", "weight_ranks", "probe_tokens"]


async def test_a_place_that_no_replica_survives_ends_the_run(tmp_path: Path):
    start = Start(tmp_path, Ranks(), Mortal(0, "start"), later=[Mortal(number, "start") for number in range(1, 9)])
    with pytest.raises(
        EngineFailure, match=r"^replica 0 and all that took its place died while the run started: replica 3 died \(start\)$"
    ):
        await start.go()
    assert start.begun == [(1, 0), (2, 0), (3, 0)]


async def test_what_is_wrong_with_the_input_is_no_loss(tmp_path: Path):
    start = Start(tmp_path, Ranks(), Mortal(0, "start", ModelError("no such model")))
    with pytest.raises(ModelError, match="no such model"):
        await start.go()
    assert start.notes == []


def test_a_process_that_was_to_start_on_a_lost_machine_has_died():
    with (
        pytest.raises(WorkerDied, match=r"^snapshot holder 1 could not be started \(open\): .*the node is gone"),
        unwrapped("snapshot holder 1", "open"),
    ):
        raise ActorUnschedulableError("the node is gone")


async def test_ranks_meet_once_all_processes_run():
    """Else those who wait in the meeting for one that never comes cannot be called out of it."""
    asked: list[str] = []

    class Rank(LocalWorker):
        async def call(self, method: str, /, *args: Any) -> Any:
            asked.append(f"{self.name}: {method}")

        async def where(self) -> Any:
            if self.name == "trainer rank 1":
                raise WorkerDied("trainer rank 1 died (where it is)")

    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "train": {"ranks": 2}})
    with pytest.raises(TrainersLost, match="trainer rank 1 died"):
        await Trainers(lambda rank: Rank(f"trainer rank {rank}", None), config, put=lambda encoded: encoded).start()
    assert asked == []
