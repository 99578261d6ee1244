"""Every algorithm that learns from rewards reaches the quickstart's target, by its example, from the quickstart's start."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.full.conftest import LEARNED
from tests.loop.local import LocalRun
from verst.config.load import load_config
from verst.recipes.tiny import build_tiny_model, write_demonstrations
from verst.runtime.branch import create_run
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight

EXAMPLES = Path(__file__).parents[2] / "examples"
ALGORITHMS = {"grpo": EXAMPLES / "quickstart_grpo.yaml"} | {
    file.stem: file for file in sorted((EXAMPLES / "algorithms").glob("*.yaml")) if file.stem != "dpo"
}
"""All that roll out what they train: DPO on given pairs has no more to learn from than these."""
TARGET = 0.9
SEEDS = (0, 1, 2)
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def run_of(example: Path, changes: dict[str, dict[str, Any]]) -> LocalRun:
    values = yaml.safe_load(example.read_text())
    config = load_config(values | {section: values.get(section, {}) | change for section, change in changes.items()})
    extensions = Extensions()
    return LocalRun(create_run(config, extensions.pack(), preflight(config, extensions).stream, None))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model after its supervised fine-tuning."""
    root = tmp_path_factory.mktemp("quickstart")
    build_tiny_model(root / "model")
    write_demonstrations(root / "demonstrations.jsonl")
    changes = {"run": {"dir": str(root)}, "model": {"path": str(root / "model")}, "data": {"path": str(root / "demonstrations.jsonl")}}
    run = run_of(EXAMPLES / "quickstart_sft.yaml", changes)
    asyncio.run(run.go())
    return run.run.final


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, taught: Path) -> Path:
    """What GRPO makes of it."""
    run = run_of(ALGORITHMS["grpo"], {"run": {"dir": str(tmp_path_factory.mktemp("teacher"))}, "model": {"path": str(taught)}})
    asyncio.run(run.go())
    return run.run.final


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_the_target_is_reached(tmp_path: Path, taught: Path, teacher: Path, algorithm: str, seed: int):
    changes = {"run": {"dir": str(tmp_path), "seed": seed}, "model": {"path": str(taught)}, "eval": {"every_steps": 5}}
    if algorithm == "distill":
        changes["algorithm"] = {"teacher": str(teacher)}
    run = await run_of(ALGORITHMS[algorithm], changes).go()
    gc.collect()
    found = {row["step"]: row["eval/reward"] for row in run.rows if row.get("eval/reward") is not None}
    reached = [step for step, value in found.items() if value >= TARGET]
    assert reached, f"the evaluations were {found}"
    seconds = sum(row["time/step_s"] for row in run.rows if row["kind"] == "step" and row["step"] <= reached[0])
    LEARNED[algorithm].append((reached[0], seconds, found[max(found)]))
