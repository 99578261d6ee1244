"""Processes of a real run are killed or stopped, one after another, at chosen moments. The run must not show it in its weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run
from tests.loop.rewards import spread
from verst.journal.audit import audit
from verst.journal.log import Journal, JournalReader
from verst.runtime.placement import Placement
from verst.runtime.service import RunService
from verst.testing import FaultInjector

STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_ray")]

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]


def run_of(directory: Path, model: Path, ranks: int = 2, **values: Any) -> LocalRun:
    base = {
        "run": {"name": "run", "dir": str(directory), "steps": STEPS, "seed": 3},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "ranks": ranks, "deadline_s": 60},
        "checkpoint": {"every_steps": 3},
    }
    return local_run(directory, model, base | values, reward=spread, prompts=ROWS)


async def under(injector: FaultInjector, run: LocalRun) -> list[str]:
    """Runs to the end with its faults. Returns what was told."""
    service = RunService(str(run.run.root), injector.spawn, Placement(0.0, 0.0))
    try:
        await service.run()
    finally:
        _, lines = await service.lines(0, 0)
        print("\n".join(lines))  # noqa: T201 - shown by pytest if the test fails
    return lines


def digests(run: LocalRun) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(step).digest for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[str]:
    run = run_of(tmp_path_factory.mktemp("undisturbed"), model)
    asyncio.run(under(FaultInjector(), run))
    found = digests(run)
    assert len(set(found)) == STEPS, "every step must change the weights, or the tests below prove nothing"
    return found


@pytest.fixture
async def injector(monkeypatch: pytest.MonkeyPatch) -> FaultInjector:
    """Also knows the moments of the loop itself: a batch or a commit on its way to the disk."""
    found, loops = FaultInjector(), [asyncio.get_running_loop()]
    for name in ("append_batch", "append_commit"):
        original = getattr(Journal, name)

        def told(self: Journal, record: Any, original: Any = original, name: str = name) -> None:
            loops[0].call_soon_threadsafe(found.moment, name)
            original(self, record)

        monkeypatch.setattr(Journal, name, told)
    return found


async def test_a_rank_an_engine_and_a_holder_die_in_one_run(tmp_path: Path, model: Path, injector: FaultInjector, undisturbed: list[str]):
    injector.plan("trainer rank 1", "trainer rank 1: forward_backward", 2, delay_s=0.002)
    injector.plan("replica", "replica: roll", 10, delay_s=0.01)
    injector.plan("trainer rank 0", "trainer rank 0: optimizer_step", 4)
    injector.plan("snapshot holder 0", "append_commit", 5)
    injector.plan("trainer rank 0", "append_commit", 6)
    run = run_of(tmp_path, model)
    await under(injector, run)
    assert [fault.struck is not None for fault in injector.faults] == [True] * 5
    assert digests(run) == undisturbed
    report = audit(run.run.journal)
    assert report.ok, report
