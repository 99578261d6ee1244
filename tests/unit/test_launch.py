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
from verst.runtime import attend, launch
from verst.runtime.extensions import Extensions
from verst.runtime.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = load_config({"run": {"name": "r", "dir": str(tmp_path), "steps": 3}, "model": {"path": "m"}})
    return RunDirectory.create(config, None, {})


def test_a_first_signal_asks_and_a_second_one_ends_at_once(run: RunDirectory):
    with attend.signals(run) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.stop.is_set()
        assert "SIGTERM: ending after the step in progress" in asked.lines[0]
        with pytest.raises(KeyboardInterrupt, match=r"ended at once by a second signal; .* verst resume .*/r"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_question_ends_nothing(run: RunDirectory):
    before = signal.getsignal(signal.SIGUSR1)
    with attend.signals(run) as asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (asked.standing.is_set(), asked.stop.is_set(), asked.leave.is_set()) == (True, False, False)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_closed_terminal_ends_the_watching_only_where_the_run_goes_on_without_it(run: RunDirectory):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with attend.signals(run):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL  # on a laptop the run ends with it
        with attend.signals(run, leaves=True) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (asked.leave.is_set(), asked.stop.is_set()) == (True, False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with attend.signals(run, leaves=True):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_output_that_was_closed_ends_the_watching(run: RunDirectory):
    def closed(line: str) -> None:
        raise BrokenPipeError

    asked = attend.Asked()
    attend.while_open(closed, asked)("a line")
    assert asked.leave.is_set()


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """Also where the tests were started in the background of a shell that lets such processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
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


def test_overrides_may_stand_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]):
    options = cli._parse(["resume", "runs/r", "train.ranks=2", "--address", "auto", "run.steps=5"])
    assert (options.overrides, options.address) == (["train.ranks=2", "run.steps=5"], "auto")
    for words in (["train", "f", "--addres=auto2", "--nope"], ["check", "f", "--x=1"], ["watch", "r", "train.ranks=2"]):
        with pytest.raises(SystemExit, match="2"):
            cli._parse(words)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_ray_is_started_in_the_directory_the_run_began_in(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began, elsewhere, seen, told = Path.cwd(), tmp_path / "elsewhere", [], []
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(ray, "init", lambda **options: seen.append((Path.cwd(), options["address"])))
    assert launch.start_ray(run, {}, told.append)
    assert (seen, told, Path.cwd()) == ([(began, "local")], [], elsewhere)  # also where RAY_ADDRESS names a cluster
    assert launch.worker_env(1, run.module_path)["PYTHONPATH"].split(os.pathsep)[0] == str(began)


def test_processes_of_a_ray_that_the_run_starts_inherit_its_environment(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, str]] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(dict(os.environ)))
    before, env = dict(os.environ), launch.worker_env(3, run.module_path)
    with launch._ray(run, None, env, print) as has_env:
        assert has_env
    assert seen[0].items() >= env.items()
    assert (env["OMP_NUM_THREADS"], env["PYTHONHASHSEED"]) == ("3", "0")
    assert {name: os.environ.get(name) for name in env} == {name: before.get(name) for name in env}
    with launch._ray(run, "auto", env, print) as has_env:
        assert not has_env  # processes of a cluster must be given it


def test_a_directory_that_is_gone_is_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(RunDirectory, "cwd", Path("/gone"))
    launch.start_ray(run, {}, told.append)
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
