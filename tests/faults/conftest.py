"""What the tests of faults have in common."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import MARK, Campaign, Cell, digests, tell_of_records
from tests.faults.mortal import lives
from tests.loop.local import LocalRun, local_run
from tests.loop.rewards import steady
from verst.runtime import heartbeat
from verst.testing import tiny_model

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
Make = Callable[[list[Cell]], Campaign]


STEPS = 60


def run_of(directory: Path, model: Path, steps: int = STEPS, scored_by: Any = steady, **values: Any) -> LocalRun:
    """The embedded pair on two ranks: every step changes the weights, and has a checkpoint."""
    base = {
        "run": {"name": "run", "dir": str(directory), "steps": steps, "seed": 3},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16},
        "reward": {"workers": 1},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "ranks": 2, "deadline_s": 60},
        "checkpoint": {"every_steps": 1},
    }
    return local_run(directory, model, base | values, reward=scored_by, prompts=ROWS)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[str]:
    """The weights hash of each step."""
    run = run_of(tmp_path_factory.mktemp("undisturbed"), model)
    lives(run)
    found = digests(run)
    assert len(set(found)) == STEPS, "every step must change the weights, or the tests prove nothing"
    return found


@pytest.fixture(scope="module")
def token() -> Iterator[str]:
    """Marks every process that is started from here on. To be asked for before `one_ray`."""
    os.environ[MARK] = uuid.uuid4().hex
    yield os.environ[MARK]
    del os.environ[MARK]


@pytest.fixture
def soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is ended after seconds, not after a minute."""
    monkeypatch.setattr(heartbeat, "EVERY_S", 1.0)
    monkeypatch.setattr(heartbeat, "SILENCE_S", 5.0)


@pytest.fixture
async def campaign(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes one that also knows the moments of the loop itself."""
    made: list[Campaign] = []
    tell_of_records(asyncio.get_running_loop(), lambda name: made[-1].moment(name), monkeypatch.setattr)

    def make(cells: list[Cell]) -> Campaign:
        made.append(Campaign(cells))
        return made[-1]

    return make
