"""Filters and hooks in whole runs: what was left out is left out again when steps are trained again, without asking."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loop.fakes import FakeParts, config, group
from tests.loop.local import LocalRun, local_run, stopped_after
from tests.loop.test_loop import run
from tests.loop.test_run import ROWS, vowels
from verst.errors import CallFailed, DataError, ExtensionError
from verst.journal.log import JournalReader
from verst.runtime.filtering import Filters, Judged
from verst.runtime.replay import replay
from verst.types import Group

pytestmark = pytest.mark.usefixtures("_one_thread")

CODE = """
def first(group, asked):
    with open(asked, "a") as log:
        log.write(f"{group.seq}\\n")
    if group.seq == 2: return "the third"
    if group.seq == 5: raise ValueError("the sixth")
    return {0: "the first"}

class Steps:
    def after_step(self, step, metrics):
        return {"left_out": metrics["filters/left_out"]}

def wrong(): ...
"""


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    (tmp_path / "user_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield {
        "filters": {"functions": {"user_code:first": {"asked": str(tmp_path / "asked")}}},
        "hooks": {"classes": {"user_code:Steps": {}}, "required": True},
        "checkpoint": {"every_steps": 50, "export_final": False},
    }
    sys.modules.pop("user_code", None)


def digests(run: LocalRun) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(step).digest for step in (1, 2, 3)]


async def test_what_filters_decide_is_recorded_and_stays_decided(tmp_path: Path, model: Path, values: dict[str, Any]):
    whole = await local_run(tmp_path / "whole", model, values, reward=vowels, prompts=ROWS).go()
    (tmp_path / "asked").unlink()
    again = local_run(tmp_path / "again", model, values, reward=vowels, prompts=ROWS)
    await stopped_after(again, 2)
    asked = (tmp_path / "asked").read_text().splitlines()
    (tmp_path / "asked").unlink()
    await again.go()
    record = JournalReader(whole.run.journal).batch(1)
    assert record.groups == (0, 1, 3, 4)
    assert record.left_out == {seq: {0: "filter user_code:first: the first"} for seq in (0, 1, 3, 4)}
    assert record.dropped == {2: "filter user_code:first: the third"}
    rows = [row for row in whole.rows if row["kind"] == "step"]
    assert rows[0]["filters/left_out"] >= 4
    assert sum(row["filters/dropped"] for row in rows) == sum(row["filters/failed"] for row in rows) == 1
    assert [row["custom/left_out"] for row in rows] == [row["filters/left_out"] for row in rows]
    assert any("group 5" in line and "dropped: filter user_code:first raised ValueError: the sixth" in line for line in whole.lines)
    trained = {seq for step in (1, 2) for seq in JournalReader(again.run.journal).batch(step).taken}
    assert {int(seq) for seq in asked} >= trained
    assert not {int(seq) for seq in (tmp_path / "asked").read_text().splitlines()} & trained
    assert digests(again) == digests(whole)


def test_a_replay_leaves_out_the_same_and_asks_nobody(tmp_path: Path, model: Path, values: dict[str, Any]):
    made = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
    asyncio.run(made.go())
    (tmp_path / "user_code.py").unlink()
    assert replay(made.run.root, 0, echo=lambda line: None).first_difference is None


async def test_user_code_that_does_not_fit_ends_the_start(tmp_path: Path, model: Path, values: dict[str, Any]):
    wrong = {"filters": {"functions": {"user_code:wrong": {}}}}
    with pytest.raises(ExtensionError, match=r"filter wrong\(\) in .*user_code.py:13 cannot be called as wrong\(group\)"):
        await local_run(tmp_path, model, values | wrong, reward=vowels, prompts=ROWS).go()
    with pytest.raises(ExtensionError, match="hook 'no_such_module:Hook': no module 'no_such_module'"):
        local_run(tmp_path / "b", model, {"hooks": {"classes": {"no_such_module:Hook": {}}}}, reward=vowels, prompts=ROWS)


async def test_a_required_hook_that_fails_ends_the_run_behind_the_report_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "failing.py").write_text(
        "class Fails:\n    def after_step(self, step, metrics): return {'worse': 1} if step == 1 else step\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = config(hooks={"classes": {"failing:Fails": {}}, "required": True})
    parts = FakeParts(cfg, tmp_path)
    try:
        with pytest.raises(CallFailed, match=r"after step 2: hook failing:Fails returned 2 of type int.*\(hooks.required ends the run\)"):
            await run(cfg, parts)
    finally:
        parts.hooks.close()
    assert parts.journal.index.last_commit == 2
    assert [(row.get("custom/worse"), row["hooks/failed"]) for row in parts.rows.values()] == [(1.0, 0.0), (None, 1.0)]


class Says(Filters):
    """Answers without a process."""

    def __init__(self, answer: Judged) -> None:
        self._answer = answer

    async def judge(self, group: Group) -> Judged:
        return self._answer

    def report(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Judged(failed="filter f raised ValueError"), r"groups in a row could not be trained; .*: filter f raised ValueError"),
        (Judged(dropped="filter f: never"), r"41 groups were dropped .* \(the last: filter f: never\) .* or a filter too strict"),
        (Judged({0: "filter f: no", 1: "filter f: no"}), r"\(the last: 2 of 2 trajectories failed: left out by filter f: no\)"),
    ],
)
async def test_a_filter_that_lets_nothing_pass_ends_the_run(tmp_path: Path, answer: Judged, words: str):
    parts = FakeParts(config(), tmp_path)
    parts.filters = Says(answer)
    with pytest.raises(DataError, match=words):
        await run(config(), parts)
    assert parts.trainers.trained == []


async def test_a_group_whose_rest_has_no_signal_is_replaced(tmp_path: Path):
    cfg = config(run={"steps": 1}, rollout={"group_size": 3}, algorithm={"name": "grpo", "dynamic_sampling": True})
    parts = FakeParts(cfg, tmp_path, roll=lambda seq, version: group(seq, version, (1.0, 0.0, 0.0) if seq == 0 else (0.0, 1.0, 0.0)))
    parts.filters = Says(Judged({0: "filter f: no"}))
    await run(cfg, parts)
    assert parts.trainers.trained == [1, 2]
    assert parts.rows[1]["groups/replaced"] == 1
