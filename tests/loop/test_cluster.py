"""Runs on a Ray cluster that somebody else runs: a head started by `ray start`, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import verst
from tests.loop.local import prompts_file
from tests.processes import lives
from verst.errors import ConfigError
from verst.journal.audit import audit
from verst.journal.lock import holder_of
from verst.journal.log import JournalReader
from verst.observe.sinks import read_rows
from verst.runtime import cluster
from verst.runtime.cluster import ClusterUnreachable
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model

DEADLINE_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def config(directory: Path, name: str = "r", steps: int = 3) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": str(directory / "runs"), "steps": steps},
        "model": {"path": str(directory / "model")},
        "data": {"path": prompts_file(directory), "max_prompt_tokens": 128},
        "rollout": {"group_size": 2, "max_new_tokens": 4},
        "reward": {"function": "tests.loop.rewards:slow"},
        "train": {"groups_per_step": 2, "lr": 1e-3},
        "checkpoint": {"export_final": False},
    }


@pytest.mark.parametrize("address", ["somewhere", "host:", "host:http", "ray://host:10001", "host:70000"])
def test_what_is_no_address_is_told(tmp_path: Path, address: str):
    with pytest.raises(ConfigError, match=r"expected HOST:PORT of the head's GCS.*or auto"):
        cluster.connect(address)


def test_a_dead_address_is_told_at_once_and_leaves_no_run(tmp_path: Path):
    tiny_model(tmp_path / "model")
    begun = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=r"no Ray cluster at 127\.0\.0\.1:\d+: Connection refused\. Is the head running"):
        verst.train(config(tmp_path), address=f"127.0.0.1:{free_port()}", echo=lambda line: None)
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_is_not_ray_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 3.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(ClusterUnreachable, match="did not answer as Ray does within 3 s"):
            cluster.connect(f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begun < 10


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A cluster of one node, which ends with the module. Its address is written nowhere that other runs would look."""
    place, port = tempfile.mkdtemp(prefix="vr", dir="/tmp"), free_port()  # short: sockets lie below it
    command = ["ray", "start", "--head", f"--port={port}", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    log = (Path(place) / "log").open("w+")
    started = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *command[1:], f"--temp-dir={place}", f"--object-store-memory={1 << 28}"],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: "Ray runtime started" in Path(log.name).read_text(), started)
        yield f"127.0.0.1:{port}"
    finally:
        end_tree(started)
        log.close()
        shutil.rmtree(place, ignore_errors=True)


def end_tree(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(tree, timeout=30)
    process.wait(30)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[Any] | None = None, limit_s: float = DEADLINE_S) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.05)


def start(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "verst.cli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables
    return subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=heeds_hangups,
    )


def heeds_hangups() -> None:
    """Also where the tests themselves were started with nohup, which Verst honours."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def step_of(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0) if (run / "metrics.jsonl").exists() else 0


def begin(directory: Path, name: str, steps: int, head: str) -> tuple[Path, subprocess.Popen[str]]:
    """A run on the cluster that has made its second step."""
    tiny_model(directory / "model")
    (directory / "run.yaml").write_text(yaml.safe_dump(config(directory, name, steps)))
    process = start("train", directory / "run.yaml", "--address", head, "checkpoint.keep=1")
    run = directory / "runs" / name
    wait_for(lambda: step_of(run) >= 2, process)
    return run, process


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_outlives_its_terminal_and_obeys_the_next(tmp_path: Path, head: str):
    run, process = begin(tmp_path, "left", 400, head)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    left_at = step_of(run)
    assert process.returncode == 129, said
    assert f"look again with: verst watch {run}" in said
    assert holder_of(run) is not None
    wait_for(lambda: step_of(run) > left_at)
    watching = start("watch", run)
    alone = start("resume", run)
    said, _ = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert "is in use by process" in said
    second = start("resume", run, "--address", head)
    assert second.stdout is not None
    while "step " not in (line := second.stdout.readline()):
        assert line, "it ended without a step"
    second.kill()  # as a lost connection does: no goodbye
    second.communicate(timeout=60)
    third = start("resume", run, "--address", head)
    assert third.stdout is not None
    while "step " not in (line := third.stdout.readline()):
        assert line, "it ended without a step"
    third.send_signal(signal.SIGINT)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 130, said
    assert f"stopped; continue with: verst resume {run}" in said
    stopped_at = step_of(run)
    assert stopped_at < 400
    seen, _ = watching.communicate(timeout=DEADLINE_S)
    assert "(following process " in seen
    assert f"step {left_at:>3}/400" in seen
    assert f"the run is not alive; step {stopped_at} of 400" in seen, seen
    last = start("resume", run, "--address", "auto", f"run.steps={stopped_at + 1}", RAY_ADDRESS=head)
    said, _ = last.communicate(timeout=DEADLINE_S)
    assert last.returncode == 0, said
    assert f"run.steps: 400 -> {stopped_at + 1}" in said
    assert step_of(run) == stopped_at + 1
    assert JournalReader(run / "journal").index.last_commit == stopped_at + 1
    assert holder_of(run) is None
    again = start("replay", run, "--from", "0", "--address", head)
    said, _ = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0, said
    assert f"steps 1 to {stopped_at + 1}: weights as committed" in said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_loop_that_dies_unwatched_goes_on_by_itself(tmp_path: Path, head: str):
    run, process = begin(tmp_path, "unwatched", 400, head)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    killed = json.loads((run / "run.lock").read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    left_at = step_of(run)
    wait_for(lambda: step_of(run) > left_at + 2)
    assert json.loads((run / "run.lock").read_text())["pid"] != killed
    others = beside(run)
    assert len(others) == 3, "a trainer rank, its snapshot holder and a replica"
    last = start("resume", run, "--address", head)
    assert last.stdout is not None
    while "step " not in (line := last.stdout.readline()):
        assert line, "it ended without a step"
    last.send_signal(signal.SIGINT)
    said, _ = last.communicate(timeout=60)
    assert last.returncode == 130, said
    log = RunDirectory.open(run)[0].log.read_text()
    assert "the loop starts again with processes that live: 1 trainer rank(s), 1 replica(s)" in log
    assert audit(run / "journal").ok
    wait_for(lambda: not any(lives(process.pid) for process in others))


def beside(run: Path) -> list[psutil.Process]:
    """The processes that a run's loop has started: Ray starts them as its siblings."""
    raylet = psutil.Process(json.loads((run / "run.lock").read_text())["pid"]).parent()
    assert raylet is not None
    return [child for child in raylet.children() if child.cmdline()[0].startswith("ray::KeptHost")]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_second_signal_ends_it_at_once_and_an_error_is_kept_for_later(tmp_path: Path, head: str):
    run, process = begin(tmp_path, "ended", 400, head)
    others = beside(run)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    wait_for(lambda: holder_of(run) is None)
    wait_for(lambda: not any(lives(process.pid) for process in others))  # they end with it
    (tmp_path / "model" / "config.json").unlink()
    broken = start("resume", run, "--address", head)
    said, _ = broken.communicate(timeout=DEADLINE_S)
    assert broken.returncode == 1, said
    watching = start("watch", run)
    seen, _ = watching.communicate(timeout=60)
    assert "ended by ModelError: " in seen
    assert "the run is not alive; step" in seen
