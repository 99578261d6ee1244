"""What a run says of its waits: who waits for whom, bounded in length."""

from __future__ import annotations

import time

import pytest

from verst.config.load import load_config
from verst.config.schema import Config
from verst.observe.waits import Wait, Waits
from verst.rollout.boundary import CLOSE_DEADLINE_S
from verst.runtime.limits import drain_limit_s, group_deadline_s, rolling_deadline_s
from verst.runtime.standing import group_lines, standing_lines


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


def config(in_flight: str, capacity: int) -> Config:
    return load_config(
        {
            "run": {"steps": 1},
            "model": {"path": "m"},
            "train": {"groups_per_step": 2},
            "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
            "rollout": {"capacity_groups": capacity, "deadline_s": 7.0, "group_size": 3, "max_running": 4},
            "reward": {"deadline_s": 11.0},
            "weights": {"in_flight": in_flight, "deadline_s": 13.0},
        }
    )


@pytest.mark.parametrize("in_flight", ["keep", "recompute", "finish"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 9])
def test_inner_limits_expire_before_those_around_them(in_flight: str, shared: bool, groups: int):
    """So that the innermost names what was really awaited."""
    cfg = config(in_flight, 9)
    rolling_s = rolling_deadline_s(cfg, groups, shared=shared) + CLOSE_DEADLINE_S
    scoring_s = groups * 3 * 11.0
    drains = in_flight == "finish" and not shared
    version_s = drain_limit_s(cfg) + 13.0 if drains else 0.0
    assert group_deadline_s(cfg, groups, shared=shared) > version_s + rolling_s + scoring_s
    if drains:
        assert drain_limit_s(cfg) > rolling_s  # a version waits until those in flight have ended, in one way or another
