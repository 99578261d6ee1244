"""`verst runs`: what a list and a comparison say of runs."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun
from verst import cli
from verst.config.load import load_config
from verst.errors import ConfigError
from verst.journal.lock import RunLock
from verst.runtime.listing import compare, find_runs, summarize
from verst.runtime.rundir import RunDirectory


def made(directory: Path, name: str, rewards: list[float | None], steps: int = 4, **train: Any) -> Path:
    """A run directory with these rewards in its rows."""
    values = {"run": {"name": name, "dir": str(directory), "steps": steps}, "model": {"path": "m"}, "train": train}
    run = RunDirectory.create(load_config(values), None, {})
    rows = [{"kind": "evaluation", "step": 0, "eval/reward": 0.125}]
    rows += [{"kind": "step", "step": i, "reward": r, "loss/total": -float(i)} for i, r in enumerate(rewards, 1)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run.root


def test_states_steps_and_first_to_last(tmp_path: Path):
    finished = summarize(made(tmp_path, "finished", [0.1, None, 0.3, 0.4]))
    assert (finished.state, finished.step, finished.steps) == ("finished", 4, 4)
    assert (finished.measure, finished.first, finished.last) == ("reward", 0.1, 0.4)
    stopped = made(tmp_path, "stopped", [0.1, 0.2])
    assert (summarize(stopped).state, summarize(stopped).step) == ("stopped", 2)
    with RunLock(stopped):
        assert summarize(stopped).state == "running"
    taught = summarize(made(tmp_path, "sft", [None, None]))
    assert (taught.measure, taught.first, taught.last) == ("loss/total", -1.0, -2.0)
    fresh = summarize(made(tmp_path, "fresh", []))
    assert (fresh.state, fresh.step, fresh.measure) == ("stopped", 0, None)


def test_disk_and_last_activity_are_those_of_the_files(tmp_path: Path):
    run = made(tmp_path, "r", [0.1])
    before = summarize(run)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "a").write_bytes(os.urandom(100_000))
    os.link(checkpoint / "a", checkpoint / "b")  # takes no room of its own
    os.utime(checkpoint / "a", (2_000_000_000, 2_000_000_000))
    after = summarize(run)
    assert 100_000 <= after.disk_bytes - before.disk_bytes < 120_000
    assert after.active == datetime.fromtimestamp(2_000_000_000).astimezone()


def test_runs_are_found_below_and_one_that_is_broken_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made(tmp_path / "a" / "deep", "one", [0.5, 0.6, 0.7, 0.8])
    broken = made(tmp_path, "two", [0.1])
    (broken / "config.yaml").write_text("run: [")
    (tmp_path / "three.partial").mkdir()
    (tmp_path / "three.partial" / "run.json").write_text("{}")
    assert find_runs(tmp_path) == [tmp_path / "a" / "deep" / "one", tmp_path / "two"]
    assert cli.main(["runs", str(tmp_path)]) == 0
    header, one, two = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert one.split()[:7] == ["a/deep/one", "finished", "4/4", "reward", "0.500", "->", "0.800"]
    assert two.split()[:2] == ["two", "unreadable"]
    assert "not valid YAML" in two
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["finished", "unreadable"]
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty")]) == 0
    assert "no run below" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no directory"):
        find_runs(tmp_path / "nowhere")


def test_runs_of_different_lengths_are_compared_at_the_same_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short = made(tmp_path, "short", [0.0, 0.1, 0.2, 0.3, 0.4], steps=5)
    long = made(tmp_path, "long", [i / 100 for i in range(9)], steps=9, lr=1e-3)
    found = compare([short, long], ["reward"])
    assert [curve.steps for curve in found.curves] == [(1, 2, 3, 4, 5), (1, 3, 5, 7, 9)]
    assert found.curves[1].values == (0.0, 0.02, 0.04, 0.06, 0.08)
    assert [curve.final for curve in found.curves] == [0.4, 0.08]
    assert found.settings == {"run.steps": (5, 9), "train.lr": (1e-6, 1e-3)}
    assert compare([short, short], ["loss/total"]).curves[0].best == -5.0  # a loss is better if it is lower
    assert cli.main(["runs", "--compare", str(short), str(long)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:2] == ["reward", "0%"]
    assert said[1].split()[-2:] == ["@5", "0.4"]
    assert said[-1].split() == ["train.lr", "1e-06", "0.001"]
    with pytest.raises(ConfigError, match=r"none of these runs has a metric 'rewad'; there are: .*reward"):
        compare([short, long], ["rewad"])


def test_a_step_without_the_metric_shows_the_last_value_before(tmp_path: Path):
    run = made(tmp_path, "r", [0.1, None, 0.3, None], steps=4)
    assert compare([run], ["reward"]).curves[0].values == (0.1, 0.1, 0.3, 0.3, 0.3)
    (evaluated,) = compare([run], ["eval/reward"]).curves  # before the first step
    assert (evaluated.steps, evaluated.values) == ((1, 2, 3, 3, 4), (0.125,) * 5)


def test_a_real_run_is_listed(done_run: LocalRun, tmp_path: Path):
    found = summarize(done_run.run.root)
    assert (found.state, found.step, found.steps, found.measure) == ("finished", 4, 4, "reward")
    rewards = done_run.metric("reward")
    assert (found.first, found.last) == (rewards[0], rewards[-1])
    copy = tmp_path / "copy"
    shutil.copytree(done_run.run.root, copy)
    assert compare([done_run.run.root, copy], ["reward", "mismatch/k3"]).settings == {}
