"""What a run says of its waits: who waits for whom, bounded in length."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import DeadlineExceeded
from verst.isolated.process import START_DEADLINE_S
from verst.observe.waits import Wait, Waits
from verst.rollout.boundary import CLOSE_DEADLINE_S
from verst.runtime.limits import drain_limit_s, group_deadline_s, pull_limit_s, rolling_deadline_s, step_wait_s, turn_limit_s
from verst.runtime.slots import GroupSlots
from verst.runtime.standing import Standing, group_lines, standing_lines


def test_a_waiter_has_one_wait_at_a_time():
    waits = Waits()
    waits.begin("the feed", "a prompt")
    time.sleep(0.01)
    waits.begin(3, "a replica")
    assert [(key, awaited) for key, awaited, _ in waits.now()] == [("the feed", "a prompt"), (3, "a replica")]
    assert waits.now()[0].seconds >= 0.01
    waits.begin("the feed", "a free slot")
    assert [wait.awaited for wait in waits.now()] == ["a replica", "a free slot"]
    assert (waits.of("the feed"), waits.of("nobody")) == ("a free slot", None)
    waits.end("the feed")
    waits.end("nobody")
    assert [wait.key for wait in waits.now()] == [3]


def test_lines_by_hand():
    waits = [
        Wait("the feed", "a free slot", 61.04),
        Wait(object(), "engines to pull version 3", 12.0),
        Wait(object(), "engines to pull version 3", 11.0),
    ]
    held = {8: ("its turn", 2.0), 4: ("the engine of replica 0", 60.0), 5: ("the engine of replica 0", 61.0), 6: ("its rewards", 5.0)}
    assert standing_lines(waits, held, 5) == [
        "who waits for whom:",
        "  the feed waits for a free slot (61.0 s)",
        "  the loop waits for engines to pull version 3 (12.0 s)",
        "  4 of 5 group slots are held:",
        "    2 groups wait for the engine of replica 0 (up to 61.0 s): 4, 5",
        "    group 6 waits for its rewards (5.0 s)",
        "    group 8 waits for its turn (2.0 s)",
    ]
    assert standing_lines([], {}, 5) == ["who waits for whom:", "  0 of 5 group slots are held"]


def test_thousands_of_groups_are_a_few_lines():
    held = {seq: (f"the engine of replica {seq % 64}", float(seq)) for seq in range(4096)}
    waits = [Wait(object(), f"trainer rank {rank}: forward_backward", 1.0) for rank in range(1024)]
    lines = standing_lines(waits, held, 4096)
    assert len(lines) < 30
    assert max(map(len, lines)) < 120
    assert lines[13] == "  and 1012 more"
    assert lines[-1] == "    and 52 more kinds of wait"
    assert group_lines(held)[0] == "64 groups wait for the engine of replica 63 (up to 4095.0 s): 63, 127, 191, 255, 319, …"


def config(in_flight: str = "keep", **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "run": {"steps": 1},
        "model": {"path": "m"},
        "data": {"holdout": 0.1},
        "train": {"groups_per_step": 2, "deadline_s": 17.0},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "rollout": {"capacity_groups": 9, "deadline_s": 7.0, "group_size": 3, "max_running": 4},
        "reward": {"deadline_s": 11.0},
        "weights": {"in_flight": in_flight, "deadline_s": 13.0},
    }
    return load_config({k: base.get(k, {}) | sections.get(k, {}) for k in base | sections})


@pytest.mark.parametrize("in_flight", ["keep", "recompute", "finish"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("oversample", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("evaluated", [0, 50])
def test_inner_limits_expire_before_those_around_them(
    in_flight: str, shared: bool, turns: int, oversample: int, replicas: int, evaluated: int
):
    """So that the innermost names what was really awaited."""
    rollout = {"capacity_groups": 9, "deadline_s": 7.0, "group_size": 3, "max_running": 4, "max_turns": turns, "oversample": oversample}
    evaluation = {"every_steps": 1, "prompts": evaluated} if evaluated else {"every_steps": 0}
    cfg = config(
        in_flight,
        run={"steps": 1, "deterministic": False},
        rollout=rollout | {"replicas": replicas},
        eval=evaluation,
    )
    members, most = 3 + oversample, 9 * (3 + oversample) + evaluated
    assert cfg.rolled_per_group == members
    drains = in_flight == "finish" and not shared
    pull_s = 2 * (2 * 13.0 + 20)  # two attempts, each with a new group
    stood_s = cfg.worst_staleness * (pull_s + turn_limit_s(cfg) * shared)  # while trajectories' clocks do
    version_s = drain_limit_s(cfg) + pull_s if drains else stood_s
    last_s = 0.0
    for trajectories in (1, members, 9 * members, most):
        rolling_s = rolling_deadline_s(cfg, trajectories) + CLOSE_DEADLINE_S
        scoring_s = trajectories * (11.0 + START_DEADLINE_S)
        assert group_deadline_s(cfg, trajectories, shared=shared) > version_s + rolling_s + scoring_s
        assert rolling_s >= last_s
        last_s = rolling_s
        if drains:
            assert drain_limit_s(cfg) > rolling_s  # a version waits until those in flight have ended, in one way or another
    assert pull_limit_s(cfg) >= pull_s + drain_limit_s(cfg)
    step_s = step_wait_s(cfg, shared=shared)
    assert step_s > 2 * group_deadline_s(cfg, most, shared=shared)  # which may be rolled twice


@pytest.mark.parametrize(("turns", "expected"), [(1, [1, 1, 2, 7]), (3, [4, 4, 4, 7])])
def test_a_later_turn_has_the_time_of_all_that_its_replica_can_hold(turns: int, expected: list[int]):
    """By hand: 9 groups of 3 for 2 replicas are 5 groups, 15 trajectories, for 4 places."""
    rollout = {"capacity_groups": 9, "deadline_s": 7.0, "group_size": 3, "max_running": 4, "replicas": 2, "max_turns": turns}
    cfg = config(rollout=rollout)
    assert [rolling_deadline_s(cfg, trajectories) / 7.0 for trajectories in (1, 3, 4, 24)] == expected


def test_the_members_of_an_evaluated_prompt_count():
    cfg = config(rollout={"max_running": 64, "deadline_s": 600.0})
    assert rolling_deadline_s(cfg, 256, samples=256) == 5 * 600  # four rounds for 64 places
    several = config(rollout={"max_running": 64, "deadline_s": 600.0, "max_turns": 2}, eval={"every_steps": 1, "prompts": 8})
    assert rolling_deadline_s(several, 256, samples=256) == (1 + (8 * 256 + 2 * 8) // 64) * 600


def test_a_group_beside_an_evaluation_comes_back_before_the_step_gives_up():
    """256 prompts of one trajectory are not 256 groups of eight."""
    cfg = config(
        rollout={"capacity_groups": 4, "group_size": 8, "max_running": 64, "deadline_s": 600.0}, eval={"every_steps": 1, "prompts": 256}
    )
    assert rolling_deadline_s(cfg, 256 + 8) == 5 * 600
    assert group_deadline_s(cfg, 256 + 8, shared=False) < step_wait_s(cfg, shared=False) / 2


class Deaf:
    """Replicas of which one breaks as it is asked."""

    async def standing(self) -> Any:
        raise ZeroDivisionError("a defect")


async def test_what_cannot_be_told_takes_no_deadlines_place():

    async def keep(reason: str) -> list[str]:
        return [f"what each process did then: FILE ({reason})"]

    standing = Standing(GroupSlots(2), cast(Any, Deaf()), keep)

    async def late() -> None:
        raise DeadlineExceeded("waited 5 s for replica 0: pull")

    with pytest.raises(DeadlineExceeded) as ended:
        await standing.explained(late)
    expected = [
        "waited 5 s for replica 0: pull",
        "who waits for whom could not be told: ZeroDivisionError: a defect",
        "what each process did then: FILE (a deadline passed)",
    ]
    assert str(ended.value).splitlines() == expected
