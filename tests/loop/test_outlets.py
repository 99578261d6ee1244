"""What a whole run sends out while it goes on: to TensorBoard, to Prometheus, and after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run, stopped_after
from tests.unit.test_tracking import events, scrape

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
LABEL = '{run="run"}'

pytestmark = pytest.mark.usefixtures("_one_thread")


def codes(trajectory: Any, fields: Any) -> float:
    """A reward that varies between the members of a group, and fails for some."""
    total = sum(map(ord, trajectory.completion))
    if total % 7 == 0:
        raise ValueError("a multiple of seven")
    return float(total % 5)


async def scraped_after(run: LocalRun, steps: int) -> dict[str, float]:
    """What the endpoint of a run that goes on says, once so many steps are reported."""
    async with asyncio.timeout(120):
        while True:
            await asyncio.sleep(0.02)
            found = [line for line in run.run.log.read_text().splitlines() if line.startswith("metrics for Prometheus at ")]
            if found:
                values = await asyncio.to_thread(scrape, found[-1].removeprefix("metrics for Prometheus at "))
                if values[f"verst_steps_total{LABEL}"] >= steps:
                    return values


async def test_a_run_is_scraped_while_it_goes_on_and_tracked_over_a_restart(tmp_path: Path, model: Path):
    values = {
        "run": {"name": "run", "dir": str(tmp_path), "steps": 6, "seed": 1},
        "checkpoint": {"every_steps": 2},
        "data": {"holdout": 0.3, "max_prompt_tokens": 64},
        "eval": {"every_steps": 3, "prompts": 4},
        "tracking": {"prometheus_port": "auto", "samples_every_steps": 4},
    }
    run = local_run(tmp_path, model, values, reward=codes, prompts=ROWS)
    await stopped_after(run, 3)
    going = asyncio.create_task(run.go())  # step 3 is trained again from the journal
    seen = await scraped_after(run, 2)
    await going

    steps = [row for row in run.rows if row["kind"] == "step"]
    step = int(seen[f"verst_version{LABEL}"])
    assert 4 <= step <= 6
    for name in ("reward", "mismatch/k3", "time/step_s", "groups/dropped"):
        assert seen[f"verst_{name.replace('/', '_')}{LABEL}"] == steps[step - 1][name]
    assert seen[f"verst_failed_trajectories_total{LABEL}"] == sum(sum(row.get("failures", {}).values()) for row in steps[2:step])

    found = events(run.run.root / "tensorboard")
    rewards = [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == "reward"]
    assert [s for s, _ in rewards] == [1, 2, 3, 4, 5, 6]  # each once, also the one that was trained twice
    assert [r for _, r in rewards] == pytest.approx([row["reward"] for row in steps])
    assert [e.step for e in found for v in e.summary.value if v.tag == "eval/reward"] == [0, 3, 6]
    tables = {e.step: v.tensor.string_val[0].decode() for e in found for v in e.summary.value if v.tag.startswith("samples")}
    assert list(tables) == [1, 4]
    assert tables[4].count("\n") == 9  # heading and eight trajectories
    assert "| 4 | count " in tables[4]
    assert run.metric("tracking/lost") == [0] * 6
    assert run.metric("checkpoint/step")[-1] >= 4
