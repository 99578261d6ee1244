"""What a run tells: whose numbers stand in a row, and which lines a late watcher gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.loop.fakes import group
from verst.errors import CheckpointError
from verst.observe.limits import FidelityWatch
from verst.observe.report import summary
from verst.observe.sinks import read_rows
from verst.observe.spans import Spans
from verst.observe.terminal import step_line
from verst.runtime import observer as module
from verst.runtime.observer import Observer
from verst.runtime.transfer import Brought
from verst.types import NO_VERSION, Group


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Observer]:
    paths = {"metrics": "metrics.jsonl", "timeline": "timeline.jsonl", "report": "report.png", "log": "run.log"}
    run = SimpleNamespace(root=tmp_path, **{name: tmp_path / file for name, file in paths.items()})
    observer = Observer(cast(Any, run), 5, FidelityWatch(0.01, "warn"))
    yield observer
    observer.close()


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def generate(observer: Observer, group: Group) -> None:
    with observer.timeline.group(group.seq, group.prompt.id, 0) as became:
        became.append(group)


def test_tokens_per_second_are_of_what_was_generated_since_the_row_before(observer: Observer, tmp_path: Path):
    journaled, fresh = group(0, 0), group(1, 0)
    generate(observer, fresh)  # two trajectories of one token each; the other group was generated before a restart
    observer.step(1, [journaled, fresh], {}, Spans())
    observer.step(2, [journaled], {}, Spans())  # trained again from the journal
    first, second = rows_of(tmp_path)
    assert first["tokens_per_s"] * first["time/step_s"] == pytest.approx(2)
    assert "tokens_per_s" not in second


def test_a_line_with_half_of_a_surrogate_pair_is_told_with_an_escape(observer: Observer, tmp_path: Path):
    """Reasons of filters, rewards and environments hold what a model wrote, and JSON has such halves as escapes."""
    observer.note('no tool is called "\ud83d"')
    assert list(observer._lines) == ['no tool is called "\\ud83d"']
    assert (tmp_path / "run.log").read_text() == 'no tool is called "\\ud83d"\n'


def test_demonstrations_are_not_generated(observer: Observer, tmp_path: Path):
    generate(observer, group(0, NO_VERSION))
    observer.step(1, [group(0, NO_VERSION)], {"loss/total": 1.0}, Spans())
    assert "tokens_per_s" not in rows_of(tmp_path)[0]
    assert "tokens/s" not in " ".join(summary(rows_of(tmp_path)))


def test_a_step_trained_again_keeps_the_speed_of_its_first_time(tmp_path: Path):
    first = {"kind": "step", "step": 1, "reward": 0.5, "tokens_per_s": 100.0, "time/step_s": 2.0, "time/rollout_s": 1.5}
    again = {"kind": "step", "step": 1, "reward": 0.25, "time/step_s": 0.5, "time/load_s": 0.1}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(again)}\n")
    assert read_rows(tmp_path / "metrics.jsonl") == [first | {"reward": 0.25}]
    assert summary([first])[-1] == "2.0 s in steps, 2.00 s each, 100 tokens/s (steps 1 to 1)"


def test_the_speed_of_a_run_is_that_of_its_steps_without_evaluations():
    steps = [{"kind": "step", "step": s, "tokens_per_s": 100.0, "time/step_s": 2.0} for s in (1, 2)]
    evaluated = {"kind": "step", "step": 3, "tokens_per_s": 40.0, "time/step_s": 10.0, "time/evaluate_s": 8.0}
    assert summary([*steps, evaluated])[-1] == "14.0 s in steps, 4.67 s each, 80 tokens/s (steps 1 to 3)"


def test_a_step_generated_again_has_its_new_speed(tmp_path: Path):
    """Its batch was not in the journal: another one took its number."""
    first = {"kind": "step", "step": 1, "tokens_per_s": 100.0, "time/step_s": 2.0}
    again = {"kind": "step", "step": 1, "tokens_per_s": 50.0, "time/step_s": 1.0}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(again)}\n")
    assert read_rows(tmp_path / "metrics.jsonl") == [again]


def test_a_probe_is_shown_with_its_version(observer: Observer, tmp_path: Path):
    observer.step(1, [], {}, Spans())
    observer.published(1, Brought(0.25, {"generated_tokens": 7.0}))
    observer.step(2, [], {}, Spans())
    first, second = rows_of(tmp_path)
    assert "mismatch/probe" not in first  # none was measured, which is not 0
    assert (second["mismatch/probe"], second["mismatch/probe_version"], second["engine/generated_tokens"]) == (0.25, 1, 7)


async def test_failed_checkpoints_are_told_and_counted(observer: Observer, tmp_path: Path):
    observer.step(1, [], {}, Spans())
    observer.checkpoint_failed(1, CheckpointError("the disk is full"))
    observer.step(2, [], {}, Spans())
    assert [row["checkpoint/failed"] for row in rows_of(tmp_path)] == [0, 1]
    _, lines = await observer.lines(0, 0)
    assert "checkpoint of step 1 was not written (the disk is full)" in lines[1]
    assert "checkpoints failed 1" in lines[2]
    assert "checkpoints failed" not in lines[0]


@pytest.fixture
def _three_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_LINES", 3)


@pytest.mark.usefixtures("_three_lines")
async def test_a_watcher_gets_each_line_once_and_is_told_of_those_it_missed(observer: Observer):
    observer.note("a")
    assert await observer.lines(0, 0) == (1, ["a"])
    assert await observer.lines(1, 0) == (1, [])
    for line in "bcdef":
        observer.note(line)
    assert await observer.lines(4, 0) == (6, ["e", "f"])
    assert await observer.lines(3, 0) == (6, ["d", "e", "f"])
    assert await observer.lines(1, 0) == (6, ["(2 lines are no longer kept)", "d", "e", "f"])


def test_a_person_sees_the_rewards_of_named_sets():
    row = {"reward": 0.5, "eval/reward": 0.25, "eval/math/reward": 0.125, "eval/math/pass_at_2": 0.3, "time/step_s": 1.0}
    assert step_line(3, 9, row).startswith("step 3/9  reward 0.500  eval 0.250  eval math 0.125  1.00 s")
    rows = [
        {"kind": "evaluation", "step": 0, "eval/math/reward": 0.0},
        {"kind": "step", "step": 1, "rollout/failed": 0.0, **row},
    ]
    assert summary(rows)[0] == "1 steps: reward 0.500 -> 0.500, eval/reward 0.250 -> 0.250, eval/math/reward 0.000 -> 0.125"
