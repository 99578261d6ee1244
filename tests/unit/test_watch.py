"""`verst watch`: what a run told, from another terminal, while it lives and afterwards."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from pathlib import Path

import pytest

from verst.config.load import load_config
from verst.errors import ConfigError
from verst.journal.lock import LOCK_NAME, RunLock, holder_of
from verst.runtime import watch as module
from verst.runtime.rundir import RunDirectory
from verst.runtime.watch import watch


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = load_config({"run": {"name": "r", "dir": str(tmp_path), "steps": 3}, "model": {"path": "m"}})
    return RunDirectory.create(config, None, {})


@pytest.mark.parametrize("live", [False, True])
def test_a_dead_run_shows_its_last_lines_and_says_so(run: RunDirectory, live: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)  # no view without a terminal: lines as ever
    told: list[str] = []
    run.log.write_text("".join(f"line {i}\n" for i in range(30)))
    run.metrics.write_text(json.dumps({"kind": "step", "step": 2}) + "\n")
    watch(run.root, echo=told.append, live=live)
    assert told[:-1] == [f"line {i}" for i in range(10, 30)]
    assert told[-1] == f"the run is not alive; step 2 of 3 is the last one told; continue with: verst resume {run.root}"
    run.metrics.write_text(json.dumps({"kind": "step", "step": 3}) + "\n")
    run.log.unlink()  # a run that an earlier version made
    told.clear()
    watch(run.root, echo=told.append)
    assert told == ["the run is done: all 3 steps"]


def test_a_living_run_is_followed_to_its_end_line_by_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    told: list[str] = []
    run.log.write_text("before\n")
    lock = RunLock(run.root)
    watching = threading.Thread(target=watch, args=(run.root,), kwargs={"echo": told.append})
    watching.start()
    try:
        deadline = time.monotonic() + 10
        while len(told) < 2 and time.monotonic() < deadline:  # it follows
            time.sleep(0.01)
        with run.log.open("a") as log:
            log.write("half a ")
            log.flush()
            time.sleep(0.1)
            assert "half a " not in told
            log.write("line\nlast\n")
    finally:
        lock.release()
    watching.join(10)
    assert told[0] == "before"
    assert told[1].startswith("(following process ")
    assert told[2:4] == ["half a line", "last"]
    assert told[4].startswith("the run is not alive; step 0 of 3")


def test_what_is_no_run_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="is nothing that exists, not a run"):
        watch(tmp_path / "none", echo=print)


def test_asking_who_holds_a_run_does_not_keep_it_from_starting(run: RunDirectory):
    assert holder_of(run.root / "nowhere") is None
    asked, locked = threading.Event(), []

    def start() -> None:
        asked.wait(10)
        with RunLock(run.root):
            locked.append(holder_of(run.root))

    starting = threading.Thread(target=start)
    starting.start()
    with open(run.root / LOCK_NAME) as asking:  # as one who asks does, for much longer
        fcntl.flock(asking, fcntl.LOCK_SH)
        asked.set()
        time.sleep(0.03)
    starting.join(10)
    assert len(locked) == 1
    assert locked[0].startswith("process ")
    assert holder_of(run.root) is None
