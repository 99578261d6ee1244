"""Which checkpoint is the best, and which ones stay with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from verst import cli
from verst.config.evaluated import measures_best
from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.runtime.best import BestKeeper
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import Best, best_of, checkpoint_steps, parse_reference

METRIC = "eval/math/reward"


def configured(directory: Path, keep: int = 1) -> Config:
    return load_config(
        {
            "run": {"steps": 9, "dir": str(directory)},
            "model": {"path": "m"},
            "eval": {"sets": {"math": {"path": "a.jsonl", "every_steps": 2}}},
            "checkpoint": {"best": METRIC, "keep": keep},
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(configured(tmp_path), None, {})


def written(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        (run.checkpoints / f"step-{step:08d}").mkdir()


@pytest.mark.parametrize("value_first", [True, False])
def test_a_step_counts_once_its_value_and_its_checkpoint_are_there(tmp_path: Path, run: RunDirectory, value_first: bool):
    keeper = BestKeeper(configured(tmp_path), run)
    if value_first:
        assert keeper.measured(2, {METRIC: 0.5}) is None
        written(run, 2)
        told = keeper.settle(2)
    else:
        written(run, 2)
        assert keeper.settle(2) is None
        told = keeper.measured(2, {METRIC: 0.5})
    assert told == "best checkpoint: step 2, eval/math/reward 0.500"
    assert best_of(run) == Best(METRIC, 2, 0.5)


def test_the_former_best_goes_once_the_record_names_another(tmp_path: Path, run: RunDirectory):
    keeper = BestKeeper(configured(tmp_path), run)
    written(run, 2, 4, 6)
    keeper.measured(2, {METRIC: 0.5})
    assert keeper.measured(6, {METRIC: 0.75}) == "best checkpoint: step 6, eval/math/reward 0.750 (was step 2)"
    assert checkpoint_steps(run) == [6]


@pytest.mark.parametrize("metrics", [{METRIC: math.nan}, {METRIC: math.inf}, {METRIC: None}, {}, {METRIC: 0.5}, {METRIC: 0.25}])
def test_what_is_unknown_or_equal_or_worse_never_wins(tmp_path: Path, run: RunDirectory, metrics: dict[str, Any]):
    keeper = BestKeeper(configured(tmp_path), run)
    written(run, 2, 4)
    keeper.measured(2, {METRIC: 0.5})
    assert keeper.measured(4, metrics) is None
    assert keeper.steps == (2,)
    later = BestKeeper(configured(tmp_path), run)  # of a resumed run
    assert later.measured(4, metrics) is None
    assert best_of(run) == Best(METRIC, 2, 0.5)


def test_without_its_checkpoint_a_record_is_no_match_for_any_other(tmp_path: Path, run: RunDirectory):
    run.best.write_text(json.dumps({"metric": METRIC, "step": 2, "value": 0.9}))
    written(run, 4)
    assert BestKeeper(configured(tmp_path), run).measured(4, {METRIC: 0.1}) is not None
    assert best_of(run) == Best(METRIC, 4, 0.1)


def test_the_steps_that_get_a_checkpoint_for_it(tmp_path: Path):
    assert [step for step in range(1, 10) if measures_best(configured(tmp_path), step)] == [2, 4, 6, 8, 9]


def test_its_name_on_the_command_line_and_in_the_list(tmp_path: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="has no best checkpoint"):
        parse_reference(f"{run.root}@best")
    run.best.write_text(json.dumps({"metric": METRIC, "step": 2, "value": 0.9}))
    assert parse_reference(f"{run.root}@best") == (run.root, 2)
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "step 2: eval/math/reward 0.900" in capsys.readouterr().out
    run.best.write_text("{}")
    with pytest.raises(ConfigError, match=r"best\.json cannot be read .* remove it"):
        parse_reference(f"{run.root}@best")
