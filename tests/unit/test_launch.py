"""Signals and errors between the command line and a run."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray

import verst
from verst import cli
from verst.config.load import load_config
from verst.errors import ExtensionError
from verst.runtime import launch
from verst.runtime.extensions import Extensions
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import worker_env


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = load_config({"run": {"name": "r", "dir": str(tmp_path), "steps": 3}, "model": {"path": "m"}})
    return RunDirectory.create(config, None, {})


def test_a_first_signal_asks_and_a_second_one_ends_at_once(run: RunDirectory):
    told: list[str] = []
    with launch._signals(run, told.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        assert "SIGTERM: ending after the step in progress" in told[0]
        with pytest.raises(KeyboardInterrupt, match=r"ended at once by a second signal; .* verst resume .*/r"):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_the_run_began_says_so(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    def interrupted(**_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ray, "init", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted before the run began; start it with: verst resume .*/r"):
        launch.resume(run.root, echo=lambda line: None)


@pytest.mark.parametrize(("raised", "text"), [(KeyboardInterrupt(), "verst: interrupted\n"), (KeyboardInterrupt("why"), "verst: why\n")])
def test_the_command_line_tells_which_interruption_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: KeyboardInterrupt, text: str
):
    def interrupted(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(verst, "resume", interrupted)
    assert cli.main(["resume", "runs/r"]) == 130
    assert capsys.readouterr().err == text


def test_ray_is_started_in_the_directory_the_run_began_in(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began, elsewhere, seen, told = Path.cwd(), tmp_path / "elsewhere", [], []
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(Path.cwd()))
    assert launch._start_ray(run, told.append)
    assert (seen, told, Path.cwd()) == ([began], [], elsewhere)
    assert worker_env(1, run.module_path)["PYTHONPATH"].split(os.pathsep)[0] == str(began)


def test_a_directory_that_is_gone_is_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(RunDirectory, "cwd", Path("/gone"))
    launch._start_ray(run, told.append)
    assert told == [f"warning: the run began in /gone, which is gone: its modules are looked for in {Path.cwd()} and on PYTHONPATH"]


@contextlib.contextmanager
def module(directory: Path, name: str, text: str) -> Iterator[Any]:
    import importlib
    import sys

    (directory / f"{name}.py").write_text(text)
    sys.path.insert(0, str(directory))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(directory))
        sys.modules.pop(name, None)


def test_a_function_whose_module_is_gone_is_a_diagnosis(tmp_path: Path):
    with module(tmp_path, "module_that_goes", "def score(trajectory, fields):\n    return 1.0\n") as mine:
        packed = Extensions(reward=mine.score).pack()
        assert packed == cloudpickle.dumps((mine.score, None, None))
        assert Extensions.unpack(packed).reward is mine.score
    with pytest.raises(ExtensionError, match=r"No module named 'module_that_goes'.*put it back there"):
        Extensions.unpack(packed)
