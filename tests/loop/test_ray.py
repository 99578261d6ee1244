"""Whole runs under Ray whose weights are not written: trainers and replicas are processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import verst
from tests.loop.local import prompts_file
from tests.loop.test_run import digests
from tests.loop.test_shared import SHARED, named
from verst.runtime.actors import spawn
from verst.runtime.service import RunService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("one_ray"),
]


def test_weights_by_broadcast(tmp_path: Path, model: Path):
    config = {
        "run": {"dir": str(tmp_path), "steps": 2},
        "model": {"path": str(model)},
        "data": {"path": prompts_file(tmp_path), "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16, "replicas": 2},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 4, "lr": 1e-3},
        "weights": {"transport": "group"},
        "checkpoint": {"export_final": False},
    }
    result = verst.train(config, echo=lambda line: None)
    rows = [row for row in result.rows if row["kind"] == "step"]
    assert [row["update/grad_norm"] > 0 for row in rows] == [True, True]  # version 1 differs from version 0
    assert [row["mismatch/probe_version"] for row in rows] == [0, 1]
    assert max(row["mismatch/probe"] for row in rows) < 1e-5
    assert max(row["mismatch/abs_max"] for row in rows) < 1e-5  # in step 2: of tokens that broadcast weights generated


class Parent:
    """An actor that starts another, as the loop starts trainers and replicas."""

    async def hash_seeds(self) -> list[str | None]:
        return [os.environ.get("PYTHONHASHSEED"), await spawn("child", Told).call("hash_seed")]


class Told:
    def hash_seed(self) -> str | None:
        return os.environ.get("PYTHONHASHSEED")


async def test_actors_have_the_environment_of_the_one_that_starts_them():
    parent = spawn("parent", Parent, env={"PYTHONHASHSEED": "11"})
    assert await parent.call("hash_seeds") == ["11", "11"]
    assert await spawn("other", Told).call("hash_seed") != "11"


async def test_weights_read_from_the_trainers_reach_engines_on_the_same_device(tmp_path: Path, model: Path):
    """Two ranks, two replicas, and buffers that the replicas map while the trainers hold nothing but their weights."""
    values = {
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "replicas": 2},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "ranks": 2},
        "checkpoint": {"every_steps": 2},
    }
    run = named(tmp_path, model, "shared", values | {"weights": {"transport": "shared"}})
    await RunService(str(run.run.root), spawn, SHARED).run()
    assert len(set(digests(run))) == 4
    assert max(run.metric("mismatch/probe")) < 1e-5
    assert max(run.metric("mismatch/abs_max")) < 1e-5  # of tokens that those weights generated
