"""`verst scale`: what it refuses, what it waits for, and what it says; with a run that is played by the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from verst import cli
from verst.config.load import load_config
from verst.errors import ConfigError, DeadlineExceeded
from verst.journal.lock import RunLock
from verst.runtime import scale_request, service
from verst.runtime.placement import Placement
from verst.runtime.rundir import RunDirectory
from verst.runtime.scale_request import ScaleAnswer, ScaleFailed, ScaleRequest, State, scale
from verst.runtime.service import RunService


def made(directory: Path, **sections: Any) -> RunDirectory:
    config = load_config({"run": {"name": "r", "dir": str(directory), "steps": 3}, "model": {"path": "m"}, **sections})
    return RunDirectory.create(config, None, {})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return made(tmp_path)


@pytest.fixture
def alive(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunLock]:
    monkeypatch.setattr(scale_request, "_POLL_S", 0.01)
    with RunLock(run.root) as lock:
        yield lock


def answering(run: RunDirectory, then: Callable[[ScaleRequest], None]) -> threading.Thread:
    """Plays the run: waits for a wish, and does `then`."""

    def play() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            request = ScaleRequest.read(run)
            if request is not None:
                return then(request)
            time.sleep(0.005)

    thread = threading.Thread(target=play)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("trainer=2", r"trainer=2: ranks of the trainer .*stop it, then: verst resume .*/r train\.ranks=2"),
        ("train", r"verst resume .*/r train\.ranks=N"),
        ("reward=2", r"reward=2: what can be scaled is rollout"),
        ("3", r"3: what can be scaled is rollout"),
        *((f"rollout={n}", r"give the number of replicas, 1 or more") for n in ("0", "-1", "", "two", "1.5", "٣")),
    ],
)
@pytest.mark.usefixtures("alive")
def test_what_is_no_wish_is_told(run: RunDirectory, wish: str, message: str):
    with pytest.raises(ConfigError, match=message):
        scale(run.root, wish, wait_s=1, echo=print)
    assert not run.scale_request.exists()


def test_a_run_that_does_not_live_is_told(run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["scale", str(run.root), "rollout=2"]) == 1
    assert f"{run.root} is not running: begin with that number by: verst resume {run.root} rollout.replicas=2" in capsys.readouterr().err
    assert not run.scale_request.exists()
    assert cli.main(["scale", str(tmp_path), "rollout=2"]) == 1
    assert "not a run" in capsys.readouterr().err


@pytest.mark.usefixtures("alive")
def test_what_comes_of_it_is_told_line_by_line_until_it_is_done(run: RunDirectory, capsys: pytest.CaptureFixture[str]):
    def then(request: ScaleRequest) -> None:
        assert request.replicas == 2
        ScaleAnswer("of another wish", ("not this",), State.FAILED).write(run)
        ScaleAnswer(request.id, ("replica 1 starts",), State.UNDER_WAY).write(run)
        time.sleep(0.1)
        ScaleAnswer(request.id, ("replica 1 starts", "2 replica(s) serve"), State.DONE).write(run)

    thread = answering(run, then)
    assert cli.main(["scale", str(run.root), "rollout=2"]) == 0
    thread.join()
    assert capsys.readouterr().out.splitlines() == [f"asked {run.root} for 2 replica(s)", "replica 1 starts", "2 replica(s) serve"]
    assert sorted(path.name for path in run.root.glob("scale*")) == ["scale-answer.json", "scale.json"]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (State.REFUSED, ConfigError, r"/r refuses 2 replica\(s\): too many"),
        (State.FAILED, ScaleFailed, r"/r has not 2 replica\(s\): too many"),
    ],
)
@pytest.mark.usefixtures("alive")
def test_what_did_not_succeed_is_an_error(run: RunDirectory, state: State, error: type[Exception], message: str):
    thread = answering(run, lambda request: ScaleAnswer(request.id, ("too many",), state).write(run))
    with pytest.raises(error, match=message):
        scale(run.root, "rollout=2", wait_s=10, echo=print)
    thread.join()


def test_a_run_that_ends_first_is_told(run: RunDirectory, alive: RunLock):
    thread = answering(run, lambda request: alive.release())
    with pytest.raises(ScaleFailed, match=r"has ended before that was done: verst resume .*/r rollout\.replicas=2"):
        scale(run.root, "rollout=2", wait_s=10, echo=print)
    thread.join()


@pytest.mark.usefixtures("alive")
def test_another_wish_takes_the_place_of_one(run: RunDirectory):
    thread = answering(run, lambda request: ScaleRequest.new(5).write(run))
    with pytest.raises(ScaleFailed, match=r"somebody has asked .*/r for 5 replica\(s\) meanwhile"):
        scale(run.root, "rollout=2", wait_s=10, echo=print)
    thread.join()


@pytest.mark.usefixtures("alive")
def test_nobody_has_to_wait_and_the_wish_stays(run: RunDirectory):
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for .*; the wish stays in place"):
        scale(run.root, "rollout=2", wait_s=0.05, echo=print)
    assert ScaleRequest.read(run) == ScaleRequest(json.loads(run.scale_request.read_bytes())["id"], 2)
    scale(run.root, "rollout=4", wait_s=0, echo=print)
    newest = ScaleRequest.read(run)
    assert newest is not None
    assert newest.replicas == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1, "replicas": 2}', '{"id": "a", "replicas": 0}', '{"id": "a"}'])
def test_a_file_that_is_no_wish_is_none(run: RunDirectory, content: str):
    run.scale_request.write_text(content)
    assert ScaleRequest.read(run) is None
    run.scale_answer.write_text(content)
    assert ScaleAnswer.read(run) is None


def refusal(run: RunDirectory, placement: Placement, number: int) -> str | None:
    """What a run with that placement says to so many replicas; None: nothing."""
    asked = RunService(str(run.root), placement=placement)
    try:
        asked._check_replicas(number)
    except ConfigError as error:
        return str(error)
    finally:
        asked._observer.close()
    return None


def test_what_the_placement_does_not_allow_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    shared = refusal(run, Placement(0.5, 0.5, shared=True), 2)
    assert shared is not None
    assert shared.endswith(f"stop it, then: verst resume {run.root} rollout.replicas=2")
    monkeypatch.setattr(service, "_cluster_gpus", lambda: 4)
    assert refusal(run, Placement(1.0, 1.0), 4) == "1 trainer rank(s) and 4 replica(s) need 5 GPUs, the cluster has 4 for them"
    assert refusal(run, Placement(1.0, 1.0), 3) is None
    assert refusal(run, Placement(0.0, 0.0), 100) is None


def test_servers_that_are_named_one_by_one_are_all_there_are(tmp_path: Path):
    run = made(tmp_path, rollout={"engine": "sglang", "urls": ["http://a", "http://b"], "replicas": 2})
    assert refusal(run, Placement(0.0, 0.0), 3) == "rollout.urls names the server of each replica, and has none for others"
