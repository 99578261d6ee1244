"""All trainer ranks as one: a rank that a collective holds neither delays a failure nor survives the run. And all replicas as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.loop.fakes import group
from verst.config.schema import Config
from verst.errors import CheckpointError, DataError, DeadlineExceeded, EngineFailure
from verst.journal.codec import encode_group
from verst.runtime import pools
from verst.runtime import trainers as trainers_module
from verst.runtime.actors import LocalWorker, WorkerDied
from verst.runtime.pools import Replicas
from verst.runtime.replica import Stage, fresh
from verst.runtime.trainers import Trainers, TrainersLost
from verst.types import Group, Message, Prompt, Status


class Rank(LocalWorker):
    """A worker whose calls do what `does` says, by method."""

    def __init__(self, number: int, **does: Callable[[], Any]) -> None:
        super().__init__(f"trainer rank {number}", None)
        self.killed = False
        self._does = does

    async def call(self, method: str, /, *args: Any) -> Any:
        return await self._does[method]()

    post = call

    async def stacks(self) -> str:
        return ""

    def kill(self) -> None:
        self.killed = True


async def answers() -> str:
    return "done"


async def hangs() -> None:
    await asyncio.sleep(60)


async def dies() -> None:
    raise EngineFailure("trainer rank 1 died")


def trainers(*ranks: Rank) -> Trainers:
    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "train": {"ranks": len(ranks)}})
    return Trainers(lambda rank: ranks[rank], config, put=lambda encoded: encoded)


async def test_a_rank_that_dies_is_told_without_waiting_for_its_peers(monkeypatch: pytest.MonkeyPatch):
    ranks = Rank(0, optimizer_step=hangs), Rank(1, optimizer_step=dies)
    assert trainers_module.GRACE_S == 10
    monkeypatch.setattr(trainers_module, "GRACE_S", 0.05)
    with pytest.raises(EngineFailure, match=r"trainer rank 1 died \(trainer rank 0: optimizer_step: no answer within 0\.05 s after that\)"):
        await asyncio.wait_for(trainers(*ranks).optimizer_step(0), 5)


async def test_every_process_ends_with_the_run(monkeypatch: pytest.MonkeyPatch):
    assert trainers_module._CLOSE_S == 30
    monkeypatch.setattr(trainers_module, "_CLOSE_S", 0.05)
    ranks = Rank(0, close=hangs), Rank(1, close=answers)
    with pytest.raises(TrainersLost, match=r"waited 0\.05 s for trainer rank 0: close"):
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

    monkeypatch.setattr(trainers_module, "GRACE_S", 0.01)
    with pytest.raises(CheckpointError, match=r"^no space left$"):
        await trainers(Rank(0, written=writes), Rank(1, written=full)).written(["somewhere"] * 2)
    assert ended == ["trainer rank 0"]


PROMPT = Prompt("p", (Message("user", "q"),))


class RolloutReplica(LocalWorker):
    """Of the groups that it is given, it finishes those that are not held."""

    def __init__(
        self, number: int, held: Callable[[int], bool], standing: Any = None, breaks: Mapping[int, Exception] | None = None
    ) -> None:
        """`breaks`: groups that it raises something over."""
        super().__init__(f"replica {number}", None)
        self.given: list[int] = []
        self.killed = False
        self._breaks = breaks or {}
        self._held, self._standing = held, standing or {}

    async def call(self, method: str, /, *args: Any) -> Any:
        if method in ("start", "weight_ranks"):
            return None
        assert method == "standing"
        if isinstance(self._standing, Exception):
            raise self._standing
        return self._standing

    async def post(self, method: str, /, *args: Any) -> bytes:
        seq = args[0]
        self.given.append(seq)
        if seq in self._breaks:
            raise self._breaks[seq]
        await asyncio.sleep(60 if self._held(seq) else 0.01)
        return encode_group(group(seq, 0))

    async def stacks(self) -> str:
        return ""

    def kill(self) -> None:
        self.killed = True


def replicas(*members: RolloutReplica, **rollout: Any) -> Replicas:
    return Replicas(fresh(members), Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "rollout": rollout}))


async def test_a_replica_from_which_no_group_comes_back_is_lost_and_its_group_goes_to_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pools, "group_deadline_s", lambda *args, **kwargs: 0.3)
    members = RolloutReplica(0, lambda seq: True), RolloutReplica(1, lambda seq: False)
    both = replicas(*members)

    async def rolls() -> None:
        for seq in range(1, 1000):
            await both.roll(seq, PROMPT, "policy")

    first = asyncio.create_task(both.roll(0, PROMPT, "policy"))
    await asyncio.sleep(0)
    others = asyncio.create_task(rolls())
    _, found = await asyncio.wait_for(first, 5)
    others.cancel()
    assert all(t.status is Status.FINISHED for t in found.trajectories)
    lost = await asyncio.wait_for(both.next_lost(), 5)
    assert (lost.number, lost.stage, lost.rolled_again, members[0].killed) == (0, Stage.LOST, [0], True)
    assert str(lost.error) == "waited 0.3 s for replica 0: group 0 (p), and no other came back from replica 0 meanwhile"
    assert 0 in members[1].given


@pytest.mark.parametrize("error", [WorkerDied("replica 0 died"), EngineFailure("the server ended with signal SIGKILL")])
async def test_groups_of_a_lost_replica_go_to_others_at_once(error: Exception):
    broken = RolloutReplica(0, lambda seq: False, breaks={2: error})
    members = broken, RolloutReplica(1, lambda seq: False)
    both = replicas(*members)
    found = await asyncio.wait_for(asyncio.gather(*(both.roll(seq, PROMPT, "policy") for seq in range(6))), 5)
    assert [rolled.seq for _, rolled in found] == list(range(6))
    assert sorted(members[1].given) == list(range(6)), "also those that were in flight beside the one by which it was noticed"
    assert broken.killed
    assert [replica.number for replica in both.active] == [1]


async def test_without_any_replica_a_group_waits_for_one(monkeypatch: pytest.MonkeyPatch):
    one = replicas(RolloutReplica(0, lambda seq: False, breaks={0: WorkerDied("replica 0 died")}))
    rolling = asyncio.create_task(one.roll(0, PROMPT, "policy"))
    lost = await asyncio.wait_for(one.next_lost(), 5)
    await asyncio.sleep(0.05)
    assert not rolling.done()
    new = one.begin(lambda number, slot: RolloutReplica(number, lambda seq: False), instead_of=lost)
    assert (new.number, new.slot) == (1, 0)
    await one.make_ready(new)
    await asyncio.sleep(0.05)
    assert not rolling.done(), "it holds no version yet"
    one.welcome(new, 3)
    await asyncio.wait_for(rolling, 5)
    monkeypatch.setattr(pools, "replacement_limit_s", lambda config: 0.05)
    one.lose(new, WorkerDied("replica 1 died"))
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for a replica to serve"):
        await asyncio.wait_for(one.roll(1, PROMPT, "policy"), 5)


async def test_a_group_that_takes_every_replica_with_it_ends_the_run():
    dies = {7: WorkerDied("died of its prompt")}
    four = replicas(*(RolloutReplica(number, lambda seq: False, breaks=dies) for number in range(4)))
    with pytest.raises(EngineFailure, match=r"group 7 \(p\) was on 3 replicas that were lost; the last: died of its prompt"):
        await asyncio.wait_for(four.roll(7, PROMPT, "policy"), 5)


async def test_what_is_wrong_with_the_input_is_no_loss():
    one = replicas(RolloutReplica(0, lambda seq: False, breaks={0: DataError("prompt p is too long")}))
    with pytest.raises(DataError, match="too long"):
        await one.roll(0, PROMPT, "policy")
    assert len(one.active) == 1


async def test_a_group_is_given_up_though_its_replica_cannot_say_what_it_waits_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pools, "group_deadline_s", lambda *args, **kwargs: 0.3)
    one = replicas(RolloutReplica(0, lambda seq: seq == 0, standing=ZeroDivisionError("a defect there")))
    (_, held), (_, other) = await asyncio.wait_for(asyncio.gather(*(one.roll(seq, PROMPT, "policy") for seq in (0, 1))), 5)
    assert {t.error for t in held.trajectories} == {"waited 0.3 s for replica 0, which does not answer"}
    assert all(t.status is Status.FINISHED for t in other.trajectories)


async def test_an_evaluated_prompt_is_one_trajectory_and_not_a_group_of_them(monkeypatch: pytest.MonkeyPatch):
    members = RolloutReplica(0, lambda seq: False), RolloutReplica(1, lambda seq: False)
    both = replicas(*members, group_size=4)
    reckoned: list[int] = []
    monkeypatch.setattr(both, "deadline_s", lambda groups: reckoned.append(groups) or 5.0)
    rolling: list[asyncio.Task[tuple[bytes, Group]]] = []
    for seq in (-1, -2, -3, 0, 1):
        rolling.append(asyncio.create_task(both.roll(seq, PROMPT, "evaluation" if seq < 0 else "policy")))
        await asyncio.sleep(0)  # in this order
    await asyncio.gather(*rolling)
    assert reckoned == [0, 0, 0, 1, 1]  # training groups: an evaluation has a place of its own in the limit
    assert [member.given for member in members] == [[-1, -3, 1], [-2, 0]]  # each as it has the fewest trajectories
    assert [(replica.in_flight, replica.evaluating) for replica in both.active] == [(0, 0), (0, 0)]


def test_the_limit_of_a_group_beside_an_evaluation_is_below_the_wait_of_its_step():
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": "unused"},
            "data": {"holdout": 0.1},
            "train": {"groups_per_step": 2},
            "eval": {"every_steps": 1, "prompts": 256},
        }
    )
    run = Replicas(fresh([RolloutReplica(0, bool)]), config)
    trajectories = 2 * 8 + 256
    assert run.deadline_s(2) == pools.group_deadline_s(config, trajectories, shared=False)
    assert 600 * (1 + trajectories // 64) + trajectories * 30 < run.deadline_s(2) < run.step_wait_s / 2


async def test_a_prompt_of_a_set_counts_as_its_samples():
    """Eight samples weigh as two groups of four: three training groups later both replicas have as much."""
    sets = {"math": {"task": "aiw", "every_steps": 1, "samples": 8, "temperature": 1.0}}
    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "rollout": {"group_size": 4}, "eval": {"sets": sets}})
    members = RolloutReplica(0, lambda seq: False), RolloutReplica(1, lambda seq: False)
    both = Replicas(fresh(members), config)
    rolling: list[asyncio.Task[tuple[bytes, Group]]] = []
    for seq, how in ((-1, "evaluation of math"), (0, "policy"), (1, "policy"), (2, "policy")):
        rolling.append(asyncio.create_task(both.roll(seq, PROMPT, how)))
        await asyncio.sleep(0)  # in this order
    assert [(r.in_flight, r.evaluating, r.samples) for r in both.active] == [(2, 1, 8), (2, 0, 0)]
    await asyncio.gather(*rolling)
    assert [member.given for member in members] == [[-1, 2], [0, 1]]
    assert [(r.in_flight, r.evaluating, r.samples) for r in both.active] == [(0, 0, 0)] * 2
