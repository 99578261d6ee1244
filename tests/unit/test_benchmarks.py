"""The overhead benchmark: its bare side repeats a real run exactly, and its arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.core_overhead import BareRun, Measured, main, quickstart, run_steps, smollm2, table
from tests.loop.local import LocalRun, local_run
from verst.testing import tiny_model

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(16)]
STEP = {"replica": 0.5, "rollout": 0.6, "load": 0.05, "forward_backward": 0.2, "optimizer": 0.05, "commit": 0.1}
BARE = {"engine": 0.35, "reward": 0.05, "load": 0.02, "forward_backward": 0.15, "optimizer": 0.03}


@pytest.fixture
async def run(tmp_path: Path, _one_thread: None) -> LocalRun:
    values = {
        "run": {"steps": 2},
        "rollout": {"group_size": 4, "max_new_tokens": 6},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 2, "minibatches": 2},
        "checkpoint": {"export_final": False},
    }
    return await local_run(tmp_path, tiny_model(tmp_path / "model"), values, prompts=ROWS).go()


async def test_the_bare_side_repeats_a_run(run: LocalRun, monkeypatch: pytest.MonkeyPatch):
    bare = await BareRun(run.run.root).steps()  # compares tokens, rewards and the weights hash of each step itself
    assert [set(step) for step in bare] == [set(BARE)] * 2
    assert all(seconds > 0 for step in bare for seconds in step.values())

    measured = Measured("tiny", [run_steps(run.run.root)], [bare])
    rows = [row for row in run.rows if row["kind"] == "step"]
    assert measured.step_s == pytest.approx(sum(row["time/step_s"] - row["time/checkpoint_s"] for row in rows) / 2)
    assert any(line.startswith("publish") for line in table(measured))

    monkeypatch.setattr("tests.loop.rewards.spread", lambda trajectory, fields: -1.0)
    with pytest.raises(SystemExit, match=r"reward of 0/0 is -1\.0 on the bare side .* did not do the same work"):
        await BareRun(run.run.root).steps()


def test_overhead_is_what_the_bare_calls_do_not_explain():
    slow = STEP | {"commit": 1.1}
    measured = Measured("worked by hand", [[STEP, STEP, slow], [STEP]], [[BARE, BARE, BARE], [BARE]])
    assert measured.step_s == pytest.approx(1.0)  # `replica` is inside `rollout`; the median ignores one slow step
    assert measured.bare_s == pytest.approx(0.6)
    assert measured.overhead_share == pytest.approx(0.4)
    assert measured.repeat_shares() == pytest.approx([0.4, 0.4])
    summary = measured.summary()
    assert summary["run"] == pytest.approx({"engine_s": 0.5, "reward_s": 0.1, "train_s": 0.3})
    assert summary["bare"] == pytest.approx({"engine_s": 0.35, "reward_s": 0.05, "train_s": 0.2})


def test_the_table_shows_what_each_phase_adds():
    lines = table(Measured("worked by hand", [[STEP]], [[BARE]]))
    added = {line[:46].strip(): float(line.split()[-1]) for line in lines[2:-2]}
    assert added["rollout"] == pytest.approx(200)
    assert added["in the replica (against the engine)"] == pytest.approx(150)
    assert added["commit"] == pytest.approx(100)  # nothing of it is bare
    assert added["step"] == pytest.approx(400)


def test_the_settings_fit_the_schema(tmp_path: Path):
    small, large = quickstart(tmp_path, tmp_path / "model", steps=5), smollm2(tmp_path, tmp_path / "other", steps=3)
    assert (small.train.groups_per_step, small.rollout.group_size, small.rollout.max_new_tokens) == (16, 8, 4)
    assert (large.train.groups_per_step, large.rollout.group_size, large.rollout.max_new_tokens) == (4, 4, 32)
    for config, steps in ((small, 5), (large, 3)):
        assert (config.eval.every_steps, config.checkpoint.every_steps, config.run.steps) == (0, steps, steps)
        assert config.capacity_groups == config.train.groups_per_step  # synchronous


def test_help_says_what_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["core_overhead.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "overhead_share = 1 - bare / step" in capsys.readouterr().out


def test_a_summary_is_json():
    assert json.loads(json.dumps(Measured("x", [[STEP]], [[BARE]]).summary()))["step_s"] == pytest.approx(1.0)
