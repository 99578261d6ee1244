"""Runs whose prompts are admitted by difficulty: which come when, and the same ones after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.loop.local import LocalRun, local_run, stopped_after
from tests.loop.rewards import spread
from verst.config.load import load_config
from verst.data.sources import IterableSource
from verst.errors import ConfigError
from verst.journal.log import JournalReader
from verst.runtime.preflight import _check_order

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart_curriculum.yaml"


def admitted(run: LocalRun) -> list[list[tuple[str, int]]]:
    """Of each step the prompts and their levels."""
    journal = JournalReader(run.run.journal, run.run.run_id)
    prompts = [[journal.group(seq).prompt for seq in journal.batch(step).groups] for step in range(1, journal.index.last_commit + 1)]
    return [[(prompt.id, prompt.fields["level"]) for prompt in step] for step in prompts]


async def test_a_crash_changes_neither_the_prompts_nor_the_weights(tmp_path: Path, model: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"count {i}", "level": i % 4}) + "\n" for i in range(64)))
    curriculum = {"field": "level", "start": 0, "end": 3, "prompts": 12}
    values: dict[str, Any] = {
        "run": {"steps": 5},
        "data": {"path": str(rows), "curriculum": curriculum},
        "rollout": {"capacity_groups": 8},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "checkpoint": {"every_steps": 2},
    }
    whole = await local_run(tmp_path / "whole", model, values, reward=spread).go()
    crashed = local_run(tmp_path / "crashed", model, values, reward=spread)
    await stopped_after(crashed, 3)
    await crashed.go()
    found = admitted(whole)
    assert admitted(crashed) == found
    levels = [level for step in found for _, level in step]
    assert len(levels) == 20
    assert all(level <= 3 * min(n / 12, 1) for n, level in enumerate(levels))
    assert max(levels) == 3


async def test_one_step_of_the_example(tmp_path: Path, model: Path):
    values = yaml.safe_load(EXAMPLE.read_text())
    del values["model"], values["eval"], values["reward"]
    values["run"], values["data"]["path"] = {"steps": 1}, str(EXAMPLE.parents[1] / values["data"]["path"])
    values["data"]["max_prompt_tokens"] = 256
    values["train"]["groups_per_step"] = 4
    run = await local_run(tmp_path, model, values, reward=spread).go()
    assert [level for _, level in admitted(run)[0]] == [values["data"]["curriculum"]["start"]] * 4


def test_rows_that_come_once_have_no_curriculum():
    curriculum = "data.curriculum={field: level, start: 0, end: 1, prompts: 2}"
    config = load_config({"run": {"steps": 1}, "model": {"path": "m"}}, [curriculum])
    with pytest.raises(ConfigError, match=r"data.curriculum passes over rows .* and a one-shot iterator gives them once"):
        _check_order(config, IterableSource(iter(["a"]), "prompt"))
    with pytest.raises(ConfigError, match=r"data.curriculum goes from 2 to 1: a larger number is a harder prompt"):
        load_config({"run": {"steps": 1}, "model": {"path": "m"}}, ["data.curriculum={field: level, start: 2, end: 1, prompts: 2}"])
