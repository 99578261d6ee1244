"""Processes of the production pair are killed, or stopped, in real runs on a CPU: an SGLang server, two Megatron-Core ranks over gloo."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import Cell, replay_equals, require_sound, under
from tests.faults.conftest import ROWS, Make, campaign, soon_silent, token
from tests.faults.mortal import LOOP, TREE, lives
from tests.loop.local import LocalRun, local_run
from tests.loop.rewards import steady
from verst.testing import tiny_model

__all__ = ["campaign", "soon_silent", "token"]  # fixtures, found by being here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("token", "one_ray"),
]

LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2}, "dp2": {}}


def run_of(directory: Path, layout: str, transport: str, steps: int, **rollout: Any) -> LocalRun:
    values: dict[str, Any] = {
        "run": {"name": "run", "dir": str(directory), "steps": steps, "seed": 3},
        "rollout": {"engine": "sglang", "group_size": 4, "max_new_tokens": 8, "max_running": 16} | rollout,
        "reward": {"workers": 1},
        "weights": {"transport": transport},
        "train": {
            "backend": "megatron",
            "megatron": LAYOUTS[layout],
            "ranks": 2,
            "groups_per_step": 4,
            "threads": 1,
            "lr": 1e-3,
            "microbatch_tokens": 256,
            "deadline_s": 120,
        },
        "checkpoint": {"every_steps": 2},
    }
    return local_run(directory, tiny_model(directory / "model"), values, reward=steady, prompts=ROWS)


async def survives(run: LocalRun, token: str, faults: list[Cell], campaign: Make) -> None:
    made = campaign(faults)
    await under(made, run)
    assert made.unstruck == []
    require_sound(run, token)
    await replay_equals(run)


async def test_a_rank_and_a_server_die(tmp_path: Path, token: str, campaign: Make):
    """The rank that stays is built anew in its process; the replay trains in processes that never lost one."""
    cells = [Cell("trainer rank 1", "mid-forward"), Cell("server", "generating")]
    await survives(run_of(tmp_path, "tp2", "group", 5), token, cells, campaign)


@pytest.mark.faults
@pytest.mark.parametrize(("layout", "transport"), [("tp2", "shared"), ("pp2", "group"), ("dp2", "file")])
async def test_every_process_dies(tmp_path: Path, token: str, campaign: Make, layout: str, transport: str):
    cells = [
        Cell("trainer rank 0", "mid-all-reduce"),
        Cell("replica", "mid-publish"),
        Cell("trainer rank 1", "mid-optimizer"),
        Cell("scheduler", "generating"),
        Cell("trainer rank 0", "mid-checkpoint"),
        Cell("server", "mid-publish"),
        Cell("trainer rank 1", "mid-commit"),
    ]
    await survives(run_of(tmp_path, layout, transport, 16), token, cells, campaign)


@pytest.mark.faults
@pytest.mark.usefixtures("soon_silent")
async def test_what_hangs_is_replaced(tmp_path: Path, token: str, campaign: Make):
    """A rank does not answer; an engine whose scheduler or server stands still processes no token for `rollout.deadline_s`."""
    cells = [
        Cell("trainer rank 1", "mid-all-reduce", kill=False),
        Cell("scheduler", "generating", kill=False),
        Cell("trainer rank 0", "mid-publish", kill=False),
        Cell("server", "generating", kill=False),
    ]
    await survives(run_of(tmp_path, "tp2", "file", 8, deadline_s=20), token, cells, campaign)


@pytest.mark.faults
async def test_the_loop_dies_and_everything_at_once(tmp_path: Path):
    run = run_of(tmp_path, "tp2", "file", 8)
    cells = [Cell(LOOP, "generating"), Cell(TREE, "mid-forward"), Cell(LOOP, "mid-publish"), Cell(TREE, "mid-commit")]
    await asyncio.to_thread(lives, run, cells)
    require_sound(run, run.run.run_id)
    await replay_equals(run)
