"""Turns on shared devices: how a run starts, and that no turn is waited for without end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from verst.config.schema import Config
from verst.errors import DeadlineExceeded, WeightMismatch
from verst.observe.spans import Spans
from verst.runtime.lease import Lease
from verst.runtime.limits import group_deadline_s, rolling_deadline_s
from verst.runtime.pools import Replicas
from verst.runtime.starting import Starting
from verst.runtime.trainers import Trainers


class Side:
    """Records what is asked of trainers or replicas. Each call takes a moment in which others could begin."""

    def __init__(self, name: str, events: list[str]) -> None:
        self._name, self._events = name, events

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, weights: bool | None = None) -> None:
            self._events.append(f"{self._name} {method}" + ("" if weights is None else f" weights={weights}"))
            await asyncio.sleep(0.001)
            self._events.append("done")

        return call


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, **sections})


def lease(shared: bool) -> tuple[Lease, list[str]]:
    events: list[str] = []
    sides = cast(Trainers, Side("trainers", events)), cast(Replicas, Side("replicas", events))
    return Lease(config(train={"deadline_s": 0.001}), *sides, shared=shared), events


def starting_of(lease: Lease) -> Starting:
    """Of what it starts, where nothing is lost."""
    unused = cast(Any, None)
    return Starting(lease._trainers, lease._replicas, unused, unused, unused, 0)


async def test_sides_that_share_devices_start_one_after_the_other():
    shared, events = lease(shared=True)
    await shared.start(True, starting_of(shared))
    calls = [
        "trainers start",
        "trainers release_memory weights=True",
        "replicas start",
        "replicas release_memory",
        "trainers resume_memory",
    ]
    assert events == [event for call in calls for event in (call, "done")]


async def test_sides_with_devices_of_their_own_start_together_and_are_never_asked_again():
    separate, events = lease(shared=False)
    await separate.start(True, starting_of(separate))
    assert events == ["trainers start", "replicas start", "done", "done"]
    spans = Spans()
    async with separate.training(spans), separate.transfer(reads_trainers=True):  # at once: nobody excludes the other
        pass
    assert len(events) == 4
    assert spans.seconds == {}
    assert separate.hand_over_s == 0


async def test_a_turn_that_does_not_end_is_named():
    shared, _ = lease(shared=True)
    async with shared.training(Spans()):
        with pytest.raises(DeadlineExceeded, match=r"waited 0\.01 s for the trainers to end their turn on the shared devices"):
            async with shared.transfer(reads_trainers=False):
                pass
    async with shared.transfer(reads_trainers=False):
        with pytest.raises(DeadlineExceeded, match=r"waited 0\.01 s for the replicas to end their turn on the shared devices"):
            async with shared.training(Spans()):
                pass


async def test_a_transfer_that_failed_ends_its_turn():
    shared, events = lease(shared=True)
    with pytest.raises(WeightMismatch):
        async with shared.transfer(reads_trainers=True):
            raise WeightMismatch("1 different: scale")
    async with shared.training(Spans()):
        assert events[-4::2] == ["replicas release_memory", "trainers resume_memory"]


@pytest.mark.parametrize(("capacity", "turns"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_groups_on_shared_devices_have_the_time_of_the_trainers_turns(capacity: int, turns: int):
    rollout = {"capacity_groups": capacity, "group_size": 2, "max_running": 4, "deadline_s": 10}
    chosen = config(
        rollout=rollout,
        algorithm={"name": "grpo", "old_logprobs": "behaviour"},
        train={"groups_per_step": 4, "minibatches": 2, "deadline_s": 100},
    )
    assert rolling_deadline_s(chosen, 8) == 30  # its own, and of the two before it in the engine's places; no trainer's turn counts
    taken_s = group_deadline_s(chosen, 8, shared=True) - group_deadline_s(chosen, 8, shared=False)
    assert taken_s == turns * 12 * 100
