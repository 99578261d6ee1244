"""SIGKILL of a whole process tree, then `verst resume`: the weights must be those of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.loop.local import LocalRun, prompts_file
from verst.config.load import load_config
from verst.journal.audit import audit
from verst.journal.log import JournalReader
from verst.observe.sinks import read_rows
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model

STEPS = 12
DEADLINE_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # large enough that writing a checkpoint (some 25 MB, hashed and fsynced) takes a time in which a kill can land
    return tiny_model(tmp_path_factory.mktemp("model") / "m", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)


def run_file(directory: Path, name: str, model: Path, **overrides: Any) -> Path:
    values = {
        "run": {"name": name, "dir": str(directory), "steps": STEPS, "seed": 3},
        "model": {"path": str(model)},
        "data": {"path": prompts_file(directory), "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3},
        "checkpoint": {"every_steps": 3},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | overrides))
    return path


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "verst.cli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Returns as soon as the condition holds; fails if the run ends before."""
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"the run ended too early: {process.communicate()[0]}"
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.0005)


def kill_tree_when(process: subprocess.Popen[str], condition: Callable[[], bool], delay_s: float = 0.0) -> None:
    """SIGKILL to every process of the run, so long after the condition holds."""
    wait_until(process, condition)
    time.sleep(delay_s)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert not alive


def weights(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def digests(run: Path) -> list[str]:
    reader = JournalReader(run / "journal")
    return [reader.commit(step).digest for step in range(1, STEPS + 1)]


def committed(run: Path) -> int:
    """The newest step told in the metrics."""
    metrics = run / "metrics.jsonl"
    return max((row["step"] for row in read_rows(metrics)), default=0) if metrics.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, _one_thread: None) -> Path:
    """In a single process: how a run is spread over processes has no part in its bits either."""
    config = load_config(run_file(tmp_path_factory.mktemp("undisturbed"), "undisturbed", model))
    run = LocalRun(RunDirectory.create(config, Extensions().pack(), preflight(config, Extensions()).stream))
    asyncio.run(run.go())
    assert len(set(digests(run.run.root))) == STEPS, "every step must change the weights, or the tests below prove nothing"
    return run.run.root


def test_killed_three_times_and_resumed_gives_the_same_weights(tmp_path: Path, model: Path, undisturbed: Path):
    draw = random.Random(time.time_ns())
    moments = sorted(draw.sample(range(4, STEPS - 1), 2))
    run = tmp_path / "killed"
    process = start("train", run_file(tmp_path, "killed", model))
    kill_tree_when(process, lambda: any((run / "checkpoints").glob("*.partial/*")))
    assert not list((run / "checkpoints").glob("*/manifest.json")), "the kill came after the save"
    for moment in moments:  # at random steps, and at a random place within them
        kill_tree_when(start("resume", run), lambda moment=moment: committed(run) >= moment, delay_s=draw.random() * 0.2)
    output = finish(start("resume", run))
    about = f"killed at the first save and after steps {moments}"
    assert "resumed at step" in output, about
    assert weights(run) == weights(undisturbed), about
    assert digests(run) == digests(undisturbed), about
    assert sorted(JournalReader(run / "journal").index.groups) == list(range(4 * STEPS)), "a group was lost or generated twice"
    assert audit(run / "journal", worst_staleness=0, exact=True).violations == []


def test_a_living_run_is_left_alone_and_ctrl_c_ends_it_at_a_consistent_point(tmp_path: Path, model: Path, undisturbed: Path):
    run = tmp_path / "stopped"
    process = start("train", run_file(tmp_path, "stopped", model), start_new_session=True)
    wait_until(process, lambda: committed(run) >= 1)
    second = start("resume", run)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "RunLocked" in output
    assert "is in use by process" in output
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that it started
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; continue with: verst resume" in output
    assert 1 <= committed(run) < STEPS
    finish(start("resume", run))
    assert weights(run) == weights(undisturbed)
