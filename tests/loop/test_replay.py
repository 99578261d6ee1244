"""Whole runs of every kind, replayed: the weights of each step must be the committed ones, to the bit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import verst
from tests.loop.local import LocalRun, local_run, stopped_after
from tests.loop.test_resume_ranks import STEPS, config, crashed
from tests.loop.test_routes import moe
from tests.loop.test_run import ROWS, vowels
from verst.runtime.replayed import Replayed
from verst.testing import tiny_model

pytestmark = [pytest.mark.usefixtures("_one_thread")]

__all__ = ["moe"]  # the fixture, found by being here

ROLLOUT = {"group_size": 4, "max_new_tokens": 6, "max_running": 16}
TRAIN = {"groups_per_step": 4, "threads": 1, "lr": 2e-2}


async def replayed(run: LocalRun, begin: int = 0) -> Replayed:
    """Beside the test's own event loop, as a command replays it."""
    found = await asyncio.to_thread(verst.replay, run.run.root, begin, echo=run.lines.append)
    assert all(difference == 0.0 for difference, _ in found.largest_differences.values())
    return found


def same(found: Replayed) -> list[bool]:
    return [step.same for step in found.steps]


def sometimes_equal(trajectory: Any, fields: Any) -> float:
    """As `vowels`, but the members of one group in four are rewarded alike."""
    return 0.0 if fields["answer"] == "0" else vowels(trajectory, fields)


async def test_rollout_ahead_of_training_with_late_groups_and_dropped_ones(tmp_path: Path, model: Path):
    values = {
        "run": {"name": "ahead", "dir": str(tmp_path), "steps": 4, "seed": 1},
        "rollout": ROLLOUT | {"capacity_groups": 12, "window_groups": 4},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour", "dynamic_sampling": True},
        "train": TRAIN | {"minibatches": 2, "epochs": 2},
    }
    run = await local_run(tmp_path, model, values, reward=sometimes_equal, prompts=ROWS).go()
    assert max(run.metric("staleness/max")) >= 1
    assert sum(run.metric("groups/replaced")) > 0
    found = await replayed(run)
    assert same(found) == [True] * 4
    assert len({step.digest for step in found.steps}) == 4
    assert set(found.largest_differences) == {"loss/total", "update/grad_norm"}


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
async def test_a_reference_model(tmp_path: Path, model: Path, kl_in: str):
    values = {
        "algorithm": {"name": "grpo", "kl_coefficient": 0.1, "kl_in": kl_in, "kl_estimator": "k1" if kl_in == "reward" else "k3"},
        "train": TRAIN | {"minibatches": 2, "schedule": "cosine", "warmup_steps": 1},
        "checkpoint": {"every_steps": 1, "keep": 3},
    }
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    assert same(await replayed(run)) == [True] * 3
    assert same(await replayed(run, 2)) == [True]  # the place in the schedule is that of the step


async def test_what_was_cut_is_no_part_of_a_batch(tmp_path: Path, model: Path):
    """Without deterministic mode, too: on a CPU it is what is generated that depends on the machine's pace, not what is made of it."""
    values = {
        "run": {"name": "cut", "dir": str(tmp_path), "steps": 3, "seed": 1, "deterministic": False},
        "rollout": ROLLOUT | {"oversample": 2, "max_new_tokens": 24, "max_running": 24},
    }
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    assert sum(run.metric("rollout/cut")) > 0
    assert same(await replayed(run)) == [True] * 3


async def test_demonstrations(tmp_path: Path, model: Path):
    values = {
        "algorithm": {"name": "sft"},
        "data": {"columns": {"demonstration": "answer"}, "max_prompt_tokens": 64},
        "checkpoint": {"every_steps": 2},
    }
    run = await local_run(tmp_path, model, values, prompts=ROWS).go()
    assert same(await replayed(run)) == [True] * 3
    assert same(await replayed(run, 2)) == [True]


async def test_routes_come_from_the_journal(tmp_path: Path, moe: Path):
    values = {
        "rollout": ROLLOUT | {"capacity_groups": 12},
        "train": TRAIN | {"minibatches": 2},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
    }
    run = await local_run(tmp_path, moe, values, reward=vowels, prompts=ROWS).go()
    assert max(run.metric("routes/differ")) > 0  # the trainer's own choice would give other weights
    assert same(await replayed(run)) == [True] * 3


async def test_a_run_that_crashed_and_was_resumed(tmp_path: Path, model: Path):
    values = {"run": {"name": "r", "dir": str(tmp_path), "steps": 5, "seed": 1}, "checkpoint": {"every_steps": 2}}
    run = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
    await stopped_after(run, 3)
    assert same(await replayed(run)) == [True] * 3
    await run.go()
    assert "1 journaled steps to train again" in " ".join(run.lines)
    assert same(await replayed(run)) == [True] * 5
    assert same(await replayed(run, 4)) == [True]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # Ray warns of sockets of its own
@pytest.mark.usefixtures("one_ray")
def test_two_ranks_then_one(tmp_path: Path):
    """The steps behind the checkpoint were committed by two ranks and trained again by one, which the later steps are built on."""
    tiny_model(tmp_path / "model")
    told: list[str] = []
    values = config(tmp_path, "whole", STEPS)
    values["train"] |= {"groups_per_step": 4, "microbatch_tokens": 140}  # more microbatches than ranks, so that sums differ
    whole = verst.train(values, echo=told.append)
    run = crashed(whole.path, 2, tmp_path / "run")
    verst.resume(run, overrides=["train.ranks=1", f"run.steps={STEPS + 2}"], echo=told.append)
    told.clear()
    found = verst.replay(run, 0, echo=told.append)
    assert same(found) == [True] * (STEPS + 2)
    assert [line for line in told if "rank(s)" in line] == [
        f"replays steps 1 to 6 of {run} from the initial model; fsdp, 2 rank(s), 1 thread(s) each",
        "fsdp, 1 rank(s), 1 thread(s) each from here on, as the run from step 2 on",
    ]
    assert found.largest_differences["loss/total"][0] == 0.0
    described = json.loads((run / "run.json").read_text())
    assert described["changes"][0].pop("checkpoint") == 2  # without it the run would seem to have gone on from its last commit
    (run / "run.json").write_text(json.dumps(described))
    straight = verst.replay(run, 0, echo=told.append)
    assert same(straight) == [True] * STEPS + [False] * 2
