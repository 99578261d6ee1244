"""SIGKILL of the loop's own process: what it had started lives on, and the loop that Ray starts in its place takes it up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.loop.local import LocalRun
from tests.loop.test_kill import STEPS, committed, digests, finish, run_file, start, wait_until, weights
from tests.processes import lives
from verst.config.load import load_config
from verst.journal.audit import audit
from verst.journal.log import JournalReader
from verst.runtime.extensions import Extensions
from verst.runtime.preflight import preflight
from verst.runtime.rundir import RunDirectory
from verst.testing import tiny_model
from verst.weights.location import shared_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Path, _one_thread: None) -> Path:
    config = load_config(run_file(tmp_path_factory.mktemp("undisturbed"), "undisturbed", tiny))
    run = LocalRun(RunDirectory.create(config, Extensions().pack(), preflight(config, Extensions()).stream))
    asyncio.run(run.go())
    return run.run.root


def loop_of(run: Path) -> int:
    return json.loads((run / "run.lock").read_text())["pid"]


def test_a_loop_that_is_killed_goes_on_with_the_processes_that_live(tmp_path: Path, tiny: Path, undisturbed: Path):
    draw = random.Random()
    run, killed = tmp_path / "killed", list[int]()
    process = start("train", run_file(tmp_path, "killed", tiny))
    for moment in (3, 7):
        wait_until(process, lambda moment=moment: committed(run) >= moment)
        wait_until(process, lambda: loop_of(run) not in killed)
        killed.append(loop_of(run))
        others = {child.pid for child in psutil.Process(process.pid).children(recursive=True)} - {killed[-1]}
        after_s = draw.random() * 0.3
        os.kill(killed[-1], signal.SIGKILL)
    output = finish(process)
    about = f"killed after steps 3 and 7, the last {after_s:.3f} s later:\n{output}"
    assert output.count("it starts again and goes on from its journal") == 2, about
    assert output.count("the loop starts again with processes that live: 1 trainer rank(s), 1 replica(s)") == 2, about
    assert "(memory)" in output, about
    assert weights(run) == weights(undisturbed), about
    assert digests(run) == digests(undisturbed), about
    assert sorted(JournalReader(run / "journal").index.groups) == list(range(4 * STEPS)), "a group was lost or generated twice"
    assert audit(run / "journal").ok
    assert not [pid for pid in others if lives(pid)], "a process of the run is left"
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    assert not list(shared_memory().glob(f"verst-{run_id}*"))
