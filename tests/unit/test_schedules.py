"""The benchmarks of schedules and of routes: bounds worked by hand, the runs they make, and a small soak."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks import r3_overhead, schedules
from benchmarks.async_speedup import BATCH, Work, configured
from benchmarks.soak import soaked
from verst.config.load import load_config
from verst.config.plan import read_config
from verst.routing.kinds import routed_experts


def work(*late: tuple[int, float], steps: int = 2, places: int = 10_000) -> Work:
    """Every trajectory takes 1 s but those of the `late` groups; a training step takes 1 s."""
    rolls_s = np.ones((steps * BATCH, 8))
    for group, seconds in late:
        rolls_s[group, 3] = seconds
    return Work(rolls_s, 1.0, places)


@pytest.mark.parametrize(
    ("late", "capacity", "window", "seconds"),
    [
        ((), 16, 1, 4.0),  # roll, train, roll, train
        ((), 32, 1, 3.0),  # the second batch is rolled beside the first
        (((5, 4.0),), 16, 1, 7.0),
        (((5, 4.0),), 32, 1, 6.0),  # the first step waits for it, and with it all
        (((5, 4.0),), 48, 11, 6.0),  # step 1 needs the groups below 6, and 5 is one of them
        (((5, 4.0),), 48, 12, 5.0),  # it may pass to step 2, which needs it then
        (((20, 4.0),), 32, 1, 5.0),  # rolled from the beginning, and trained after 4 s
        (((20, 4.0),), 16, 1, 7.0),  # admitted only after the first step
    ],
)
def test_the_longest_chain_by_hand(late: tuple[tuple[int, float], ...], capacity: int, window: int, seconds: float):
    assert work(*late).bound_s(capacity, window) == pytest.approx(seconds)


def test_few_places_or_long_training_bound_it_too():
    assert work(places=8).bound_s(32, 1) == pytest.approx(32 * 8 / 8)
    drawn = Work.draw(steps=5, train_s=0.5, places=64, sigma=1.0)
    assert drawn.rolls_s.sum() / 64 == pytest.approx(5 * 0.5)  # generation and training take as long
    assert drawn.bound_s(48, 16) >= 5 * 0.5


def test_schedules_are_those_that_init_writes():
    bounds = [configured(work(), batches, window).worst_staleness for batches, window in ((1, 1), (2, 1), (3, BATCH))]
    assert bounds == [0, 1, 3]


def test_the_benchmark_of_whole_runs_has_the_same_schedules():
    options = argparse.Namespace(
        groups=16, group_size=8, new=32, steps=3, epochs=1, engine="hf", backend="fsdp", model=str(Path(__file__).parent), set=[]
    )
    configs = [load_config(schedules.run_file(name, options, Path("runs"))) for name in schedules.SCHEDULES]
    assert [config.worst_staleness for config in configs] == [0, 1, 3]
    assert all(config.rollout.max_running >= config.capacity_groups * 8 for config in configs)  # nobody waits for a place
    prompts = [row["prompt"] for row in schedules.prompts()]
    assert len(set(prompts)) == len(prompts) == 320


def test_a_reward_of_token_sums_varies():
    class Rolled:
        tokens_T = np.array([3, 5, 8])

    assert schedules.varied(Rolled(), {}) == r3_overhead.varied(Rolled(), {}) == 16 % 7


def test_what_routes_cost_is_measured_on_a_model_that_routes(tmp_path: Path):
    size = r3_overhead.SIZES["cpu"]
    found = routed_experts(read_config(str(r3_overhead.build_model(tmp_path / "model", size))))
    assert found is not None
    assert (found.layers, found.chosen, found.experts) == (size["layers"], size["chosen"], size["experts"])
    row = {"time/load_s": 1.0, "time/forward_backward_s": 2.0, "time/optimizer_s": 0.5}
    assert r3_overhead.seconds([row, row, row | {"time/load_s": 9.0}], *r3_overhead.TRAINING) == pytest.approx(3.5)


@pytest.mark.slow
def test_a_soak_loses_nothing(tmp_path: Path):
    result = soaked(480, tmp_path)
    assert result["groups"] == 480
    assert 0 < result["dropped"] < 100
    assert 1 <= result["staleness"] <= result["staleness_bound"] == 3
