"""What stands out: a gradient, a rank, a replica; and who the others wait for in a call that takes long."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.ranks import saved_by_ranks
from tests.unit.fsdp_cases import BATCHES, make_backend, make_config, path, train
from verst.observe.metrics import Tally
from verst.observe.outliers import LAYER_US, Outliers, Progress, replica_paces, slowest
from verst.observe.recorded import GroupLife
from verst.runtime import overdue as module
from verst.runtime.actors import Host, LocalWorker
from verst.runtime.overdue import Overdue, behind
from verst.runtime.trainer_worker import TrainerWorker
from verst.runtime.trainers import Trainers
from verst.training.distributed import init_distributed, leave_distributed
from verst.training.pace import Pace

__all__ = ["path"]  # a fixture


# ---- gradients


def test_a_gradient_is_compared_with_the_median_of_those_before():
    outliers = Outliers()
    for step in range(10):
        assert outliers.look(step, {"update/grad_norm": 1.0 + step % 3}) == ({}, [])
    metrics, lines = outliers.look(10, {"update/grad_norm": 50.0})
    assert metrics == {"update/grad_norm_ratio": 25.0}
    assert lines == ["step 10: the gradient's norm is 25 times what is usual (50, median 2) before it is clipped"]
    metrics, lines = outliers.look(11, {"update/grad_norm": 6.0})
    assert (metrics, lines) == ({"update/grad_norm_ratio": 3.0}, [])
    assert outliers.look(12, {}) == ({}, [])  # every update was skipped


# ---- who is slow


def test_the_slowest_is_compared_with_the_median_of_the_others():
    assert slowest({0: 1.0, 1: 3.0, 2: 2.0}) == (2.0, 1)
    assert slowest({0: 3.0, 1: 1.0}) == (3.0, 0)
    assert slowest({0: 1.0}) is None
    assert slowest({}) is None


def test_replicas_by_their_time_of_generation():
    def life(replica: int, began: float, ended: float, tokens: int) -> GroupLife:
        return GroupLife(0, "p", replica, began, began, ended, ended + 1, tokens, 0, 0)

    lives = [life(0, 0, 4, 100), life(0, 2, 6, 200), life(1, 0, 3, 30), life(2, 0, 0, 0)]
    assert replica_paces(lives) == {0: 6 / 300, 1: 3 / 30}


@pytest.mark.parametrize(("side", "said"), [("train", "trainer rank 3 is slow"), ("rollout", "replica 3 is slow")])
def test_one_that_stays_slow_is_told_once(side: str, said: str):
    outliers = Outliers()

    def look(ratio: float, who: float = 3.0) -> list[str]:
        return outliers.look(1, {f"{side}/straggler_ratio": ratio, f"{side}/straggler": who})[1]

    assert [look(2.0), look(2.0, who=1.0), look(2.0), look(2.0)] == [[]] * 4  # not the same one for three steps
    (line,) = look(321.8)  # the first step of a process that has just begun
    assert line.startswith(said)
    assert "at least 2.0 times as long" in line
    assert line.endswith("for 3 steps now")
    assert [look(2.0), look(1.4), look(2.0), look(2.0)] == [[]] * 4
    assert len(look(1.6)) == 1
    assert [look(1.6) for _ in range(100)] == [[]] * 100
    assert len(outliers._slow[side][1]) < 10  # a run has many steps


class Rank(LocalWorker):
    """A worker that takes so long for a token, or answers so to `progress`."""

    def __init__(self, number: int, us: float = 1.0, progress: Progress | None = None) -> None:
        super().__init__(f"trainer rank {number}", None)
        self._us, self._progress = us, progress

    async def call(self, method: str, /, *args: Any) -> Any:
        if method == "progress":
            return self._progress if self._progress is not None else await asyncio.sleep(60)
        tally = Tally()
        tally.mean(LAYER_US, 100 * self._us, 100)
        return tally

    async def stacks(self) -> str:
        return "does not answer within 5 s; its process (7) is stopped (SIGSTOP)\nmore"


async def test_the_last_update_of_a_step_names_its_slowest_rank():
    ranks = [Rank(0), Rank(1, us=4.0), Rank(2, us=2.0)]
    trainers = Trainers(lambda rank: ranks[rank], make_config("unused", train={"ranks": 3}), put=lambda encoded: encoded)
    trainers.num_updates = 2
    assert "train/straggler_ratio" not in (await trainers.forward_backward(0, [])).report()
    report = (await trainers.forward_backward(1, [])).report()
    assert (report["train/straggler_ratio"], report["train/straggler"]) == (pytest.approx(4 / 1.5), 1.0)
    assert report[LAYER_US] == pytest.approx(7 / 3)


async def test_a_call_that_takes_much_longer_than_usual_names_who_is_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_AT_LEAST_S", 0.05)
    told: list[str] = []
    overdue = Overdue(told.append)
    ranks = [Rank(0, progress=Progress(4, waits=True)), Rank(1, progress=Progress(3, waits=False))]
    for seconds in (0.3, 0.0, 0.0, 0.0):  # the first ones are compared with nothing
        async with overdue.watching("forward_backward", ranks):
            await asyncio.sleep(seconds)
    assert told == []
    async with overdue.watching("forward_backward", ranks):
        await asyncio.sleep(0.3)
    (line,) = told
    assert line.startswith(
        "forward_backward has taken 0 s (usually 0.0 s): trainer rank 1 still computes, the others wait for it (layers passed: "
    )
    with pytest.raises(ZeroDivisionError):
        async with overdue.watching("forward_backward", ranks):
            raise ZeroDivisionError
    assert len(told) == 1


async def test_who_is_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ASK_S", 0.1)

    async def found(*progress: Progress | None) -> str:
        return await behind([Rank(number, progress=one) for number, one in enumerate(progress)])

    here, there = Progress(5, waits=True), Progress(5, waits=False)
    assert await found(here, there, here) == "trainer rank 1 still computes, the others wait for it (each has passed 5 layers)"
    assert await found(there, Progress(3, waits=False)) == "trainer rank 1 is behind (layers passed: trainer rank 0 5, trainer rank 1 3)"
    assert (await found(here, here)).startswith("no rank is behind the others (each has passed 5 layers)")
    assert await found(here, None) == "trainer rank 1 does not answer within 5 s; its process (7) is stopped (SIGSTOP)"


class Waiting:
    """A backend whose pass ends when it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def forward_backward(self, update: int, advantages: Any, returns: Any = ()) -> Tally:
        self.entered.set()
        self.released.wait(10)
        return Tally()

    def progress(self) -> Progress:
        return Progress(7, waits=True)


async def test_a_rank_says_how_far_it_is_while_it_works():
    config, backend = make_config("unused"), Waiting()
    host = Host(TrainerWorker, config, 0, "cpu")
    host._object.backend = backend
    calling = asyncio.ensure_future(host.call("forward_backward", 0, []))
    await asyncio.to_thread(backend.entered.wait, 10)
    assert await host.call("progress") == Progress(7, waits=True)
    assert not calling.done()
    backend.released.set()
    await calling


# ---- a rank's own time


def test_layers_are_timed_and_counted():
    layers = [nn.Linear(4, 4) for _ in range(2)]
    pace, tally = Pace(layers, torch.device("cpu")), Tally()
    pace.tell(tally)
    assert tally.report() == {}
    pace.begin()
    for layer in layers:
        layer(torch.zeros(3, 5, 4))
    pace.tell(tally)
    assert tally.weights[LAYER_US] == 30
    assert tally.sums[LAYER_US] > 0
    assert pace.progress() == Progress(2, waits=False)


def test_one_rank_has_nobody_to_compare_itself_with(path: str):
    backend = make_backend(make_config(path))
    assert LAYER_US not in train(backend, make_config(path), BATCHES[:1])[0].report()
    assert backend.progress() == Progress(0, waits=False)


def slow(seconds: float) -> Any:
    def sleep(*args: Any) -> None:
        time.sleep(seconds)

    return sleep


def run_rank(rank: int, directory: str, address: str, path: str) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, 2, address, timeout_s=60)
    config = make_config(path)
    backend = make_backend(config, rank, 2)
    results = [train(backend, config, [batch])[0].report()[LAYER_US] for batch in BATCHES[:2]]
    if rank == 1:
        for layer in backend._policy.layers:
            layer.get_submodule("mlp").register_forward_hook(slow(0.05))
    results.append(train(backend, config, BATCHES[2:])[0].report()[LAYER_US])
    torch.save(results, f"{directory}/rank{rank}.pt")
    leave_distributed()


@pytest.mark.slow
def test_of_two_ranks_the_one_that_sleeps_is_the_slow_one(path: str, tmp_path: Path) -> None:
    """The other waits for it in every layer, so both take equally long for a step."""
    found = saved_by_ranks(run_rank, tmp_path, path)
    ratio, who = cast(Any, slowest({rank: results[2] for rank, results in enumerate(found)}))
    assert who == 1
    assert ratio > 1.5
    assert found[1][2] > 5 * found[0][2]
