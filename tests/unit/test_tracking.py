"""Trackers: each one for real where it is installed, and none of them able to end or slow a run."""

from __future__ import annotations

import json
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.loop.fakes import group
from verst.config.load import load_config
from verst.errors import ConfigError
from verst.observe.limits import FidelityWatch
from verst.observe.prometheus import Endpoint
from verst.observe.spans import Spans
from verst.observe.trackers import TRACKERS, Report, RunInfo, Shown
from verst.observe.tracking import Tracking, redacted
from verst.runtime import outlets
from verst.runtime.observer import Observer
from verst.runtime.outlets import public_options, samples_of

KEY = "0123456789abcdef0123456789abcdef01234567"
SAMPLES = (Shown(2, "2 + 2 | two", "4", 1.0, "finished"), Shown(2, "<b>3 + 3</b>\nagain", "7", None, "failed"))
MINIMAL = {"run": {"steps": 3}, "model": {"path": "m"}}


class Recorder:
    """A tracker that keeps what it gets, and fails or waits where it is told to."""

    def __init__(self, *, fails: Sequence[int] = (), until: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.closed = False
        self._fails, self._until = fails, until

    def log(self, report: Report) -> None:
        if self._until is not None:
            self._until.wait(30)
        if report.step in self._fails:
            raise OSError(28, "No space left on device")
        self.steps.append(report.step)

    def close(self) -> None:
        self.closed = True


def report(step: int, **metrics: float) -> Report:
    return Report(step, metrics)


def test_a_broken_tracker_is_told_once_counted_and_tried_again():
    broken, sound = Recorder(fails=(1, 2)), Recorder()
    tracking = Tracking({"broken": lambda: broken, "sound": lambda: sound})
    for step in range(1, 5):
        tracking.report(report(step))
    tracking.close()
    assert (broken.steps, sound.steps) == ([3, 4], [1, 2, 3, 4])
    assert (broken.closed, sound.closed) == (True, True)
    assert tracking.lost == 2
    (line,) = tracking.told()
    assert line.startswith("warning: tracker broken: OSError: [Errno 28] No space left on device; the run goes on")
    assert tracking.told() == []


def test_a_tracker_that_hangs_holds_nothing_up():
    until, sound = threading.Event(), Recorder()
    tracking = Tracking({"hangs": lambda: Recorder(until=until), "sound": lambda: sound})
    began = time.monotonic()
    for step in range(300):
        tracking.report(report(step))
        time.sleep(0.001)  # as a step would, so that the sound one keeps up
    tracking.close(deadline_s=0.2)
    assert time.monotonic() - began < 3
    assert sound.steps == list(range(300))
    assert tracking.lost == 300 - 256 - 1  # one is with the tracker, 256 wait
    full, late = tracking.told()
    assert "tracker hangs: 256 reports wait for it already" in full
    assert "tracker hangs has not taken everything in time" in late
    until.set()


def test_a_tracker_that_cannot_be_opened_is_told_at_once_and_taken_when_it_can():
    opened, tries = Recorder(), []

    def open_tracker() -> Recorder:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("not logged in")
        return opened

    tracking = Tracking({"shy": open_tracker})
    for step in range(1, 4):
        tracking.report(report(step))
    tracking.close()
    assert opened.steps == [2, 3]
    assert tracking.lost == 1
    assert ["not logged in" in line for line in tracking.told()] == [True]


def test_steps_that_were_reported_before_a_restart_are_not_reported_again():
    tracker = Recorder()
    tracking = Tracking({"t": lambda: tracker}, after=3)
    for step in (2, 3, 4, 4, 5):
        tracking.report(report(step))
    tracking.close()
    assert tracker.steps == [4, 5]


def test_warnings_hold_no_keys(monkeypatch: pytest.MonkeyPatch):
    environment = {"WANDB_API_KEY": KEY, "HF_TOKEN": "short", "HOME": "/home/me", "MY_PASSWORD": "letmein"}
    said = redacted(f"401 for {KEY} at https://me:letmein@host/x, short, /home/me", environment)
    assert said == "401 for $WANDB_API_KEY at https://...@host/x, short, /home/me"
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def refused() -> Recorder:
        raise RuntimeError(f"the key {KEY} is not valid")

    tracking = Tracking({"t": refused})
    tracking.close()
    (line,) = tracking.told()
    assert KEY not in line
    assert "the key $WANDB_API_KEY is not valid" in line


def test_options_that_may_hold_keys_go_to_no_tracker():
    config = load_config({**MINIMAL, "reward": {"options": {"api_key": KEY}}, "rollout": {"environment_options": {"token": KEY}}})
    options = public_options(config)
    assert options["train.lr"] == 1e-6
    assert KEY not in json.dumps(options)


# ---- each tracker for real


@pytest.fixture
def info(tmp_path: Path) -> RunInfo:
    return RunInfo("night", "a1b2c3d4e5f6", "verst-tests", tmp_path, {"train.lr": 1e-3, "run.steps": 4})


STARTS = ((1, 2), (3, 4))


def once(name: str, info: RunInfo, steps: Sequence[int]) -> None:
    """One start of a run that reports these steps."""
    tracker = TRACKERS[name](info)
    for step in steps:
        metrics = {"reward": step / 4, "reward/std": 0.5, "mismatch/k3": float("nan")}
        tracker.log(Report(step, metrics, SAMPLES if step == 2 else ()))
    tracker.close()


def twice(name: str, info: RunInfo) -> None:
    """Two steps, a restart, two more."""
    for steps in STARTS:
        once(name, info, steps)


def records(path: Path) -> Iterator[bytes]:
    """The records of an event file: length, checksum, content, checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def events(directory: Path) -> list[Any]:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = [Event.FromString(record) for path in sorted(directory.iterdir()) for record in records(path)]
    return [event for event in found if event.summary.value]


def test_tensorboard(info: RunInfo):
    twice("tensorboard", info)
    found = events(info.root / "tensorboard")
    assert [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == "reward"] == [(s, s / 4) for s in (1, 2, 3, 4)]
    (table,) = [v for e in found for v in e.summary.value if v.metadata.plugin_data.plugin_name == "text"]
    lines = table.tensor.string_val[0].decode().splitlines()
    assert lines[0] == "| step | prompt | completion | reward | status |"
    assert lines[2:] == ["| 2 | 2 + 2 &#124; two | 4 | 1 | finished |", "| 2 | &lt;b>3 + 3&lt;/b><br>again | 7 |  | failed |"]


def test_tensorboard_is_opened_without_pytorch(info: RunInfo):
    program = f"""
import sys
from verst.observe.trackers import TRACKERS, Report, RunInfo
from pathlib import Path
tracker = TRACKERS["tensorboard"](RunInfo("a", "b", "c", Path({str(info.root)!r}), {{}}))
tracker.log(Report(1, {{"reward": 1.0}}))
tracker.close()
assert not {{"torch", "tensorboardX"}} & set(sys.modules)
from tensorboardX import SummaryWriter  # whole, for whoever wants it
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(events(info.root / "tensorboard")) == 1


def test_tensorboard_says_that_the_disk_is_full(info: RunInfo):
    tracker = cast(Any, TRACKERS["tensorboard"](info))
    file = tracker._writer._py_recordio_writer
    file._writer.close()
    with open("/dev/full", "wb", buffering=0) as file._writer, pytest.raises(OSError, match="No space left"):
        tracker.log(Report(1, {"reward": 1.0}))


def wandb_records(path: Path) -> Iterator[Any]:
    """What an offline run has written: records in the framing of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_offline(info: RunInfo, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -r requirements-dev.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for steps in STARTS:  # in processes of their own: wandb's service does not open one run twice
        code = f"from tests.unit.test_tracking import *; from pathlib import PosixPath; once('wandb', {info!r}, {steps})"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    files = sorted((info.root / "wandb").rglob("run-a1b2c3d4e5f6.wandb"))
    assert len(files) == 2  # one for each start, of one run: `wandb sync` appends
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for f in files for r in wandb_records(f)]
    rows = [row for row in rows if row]
    assert [(row["_step"], row["reward"]) for row in rows] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    (table,) = (info.root / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"][0] == [2, "2 + 2 | two", "4", 1.0, "finished"]
    assert not [path for path in info.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_in_the_runs_own_database(info: RunInfo, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -r requirements-dev.txt")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    twice("mlflow", info)
    with sqlite3.connect(info.root / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("night", "FINISHED")]
        assert database.execute("select step, value from metrics where key = 'reward' order by step").fetchall() == [
            (s, s / 4) for s in (1, 2, 3, 4)
        ]
        assert dict(database.execute("select key, value from params").fetchall()) == {"train.lr": "0.001", "run.steps": "4"}
    database.close()
    (table,) = (info.root / "mlflow").rglob("step_000002.json")
    assert json.loads(table.read_text())["data"][1] == [2, "<b>3 + 3</b>\nagain", "7", None, "failed"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_trackio_in_its_own_store(info: RunInfo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(info.root / "store"))
    twice("trackio", info)
    (path,) = (info.root / "store").rglob("verst-tests*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    database.close()
    assert [(name, step, json.loads(values)["reward"]) for name, step, values in rows] == [
        ("night-a1b2c3d4", s, s / 4) for s in (1, 2, 3, 4)
    ]
    assert "2 + 2 | two" in json.dumps(json.loads(rows[1][2])["samples"])


# ---- from a run's groups to reports


def test_samples_are_the_first_of_each_group_then_the_second():
    groups = [group(0, 0, (0.0, 1.0)), group(1, 0, (None, 0.5))]
    assert [(s.prompt, s.completion, s.reward, s.status) for s in samples_of(5, groups)] == [
        ("q", "c", 0.0, "finished"),
        ("q", "c", None, "failed"),
        ("q", "c", 1.0, "finished"),
        ("q", "c", 0.5, "finished"),
    ]
    assert len(samples_of(5, [group(i, 0) for i in range(9)])) == 8


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(fails=(2,))
    monkeypatch.setitem(cast(Any, TRACKERS), "tensorboard", lambda info: recorder)
    return recorder


async def test_an_observer_reports_goes_on_without_a_tracker_and_knows_what_it_had(tmp_path: Path, tracker: Recorder):
    run = SimpleNamespace(
        metrics=tmp_path / "metrics.jsonl",
        log=tmp_path / "run.log",
        report=tmp_path / "report.png",
        root=tmp_path,
        run_id="id",
        timeline=tmp_path / "timeline.jsonl",
    )
    config = load_config(MINIMAL, ["tracking.trackers=[tensorboard]"])
    for steps in ((1, 2), (2, 3)):  # step 2 is trained again after a restart
        observer = Observer(cast(Any, run), 5, FidelityWatch(0.01, "warn"))
        observer.open_outlets(config)
        for step in steps:
            observer.step(step, [group(step, 0)], {"reward": 0.5}, Spans())
        await observer.close_outlets()
        observer.close()
    assert tracker.steps == [1, 3]
    told = (tmp_path / "run.log").read_text()
    assert told.count("warning: tracker tensorboard") == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["tracking/lost"] == 0


# ---- Prometheus


def families(url: str) -> set[str]:
    """The metric families in OpenMetrics, which Prometheus asks for, by its own parser: one that is there twice is an error."""
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        return {family.name for family in text_string_to_metric_families(answer.read().decode())}


def scrape(url: str) -> dict[str, float]:
    """The samples of the text exposition format, by name and labels; checks that each family is declared."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    declared = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    found = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.partition("{")[0] in declared, line
            found[name] = float(value)
    return found


def test_prometheus_gets_the_newest_values_and_counters():
    endpoint = Endpoint("127.0.0.1", 0, run="night", version="0.1")
    try:
        endpoint.report({"eval/reward": 0.25})
        endpoint.report({"reward": 0.5, "mismatch/age_1/k3": float("nan")}, steps=1, dropped=2, failed=3)
        endpoint.report({"reward": 0.75, "loss/total": 1.0, "groups/dropped": 0.0}, steps=1, failed=1)
        found, named = scrape(endpoint.url), families(endpoint.url)
    finally:
        endpoint.close()
    assert {"verst_steps", "verst_dropped_groups", "verst_groups_dropped", "verst_loss_total"} <= named
    assert found['verst_reward{run="night"}'] == 0.75
    assert found['verst_eval_reward{run="night"}'] == 0.25  # of an evaluation before
    assert str(found['verst_mismatch_age_1_k3{run="night"}']) == "nan"
    assert found['verst_steps_total{run="night"}'] == 2
    assert found['verst_dropped_groups_total{run="night"}'] == 2
    assert found['verst_failed_trajectories_total{run="night"}'] == 4
    assert found['verst_run_info{run="night",version="0.1"}'] == 1
    assert abs(found['verst_last_report_timestamp_seconds{run="night"}'] - time.time()) < 60
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint.url, timeout=2)


def test_an_address_that_cannot_be_had_is_told_and_no_reason_to_end():
    lines: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = load_config(MINIMAL, [f"tracking.prometheus_port={taken.getsockname()[1]}"])
        assert outlets._open_endpoint(config, lines.append) is None
    assert "cannot be listened at (Address already in use); the run goes on without" in lines[0]


# ---- options


def test_a_tracker_that_is_not_installed_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("wandb", "trackio") else object())
    config = load_config({**MINIMAL, "tracking": {"trackers": ["tensorboard", "wandb", "trackio"]}})
    with pytest.raises(ConfigError, match=r"names wandb, trackio, not installed here: pip install 'verst\[wandb,trackio\]'"):
        outlets.check_trackers(config.tracking)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking.trackers=[wandb, wandb]"], "a name is there twice"),
        (["tracking.trackers=[comet]"], "'tensorboard', 'wandb', 'mlflow' or 'trackio'"),
        (["tracking.project=x"], "tracking.project does not apply: tracking.trackers names none that has projects"),
        (["tracking.prometheus_host=0.0.0.0"], "prometheus_port is 0, so nothing is served"),
        (["tracking.prometheus_port=70000"], "65535 or less"),
    ],
)
def test_options_that_make_no_sense_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(MINIMAL, overrides)


def test_trackers_may_be_switched_off_in_a_file_that_has_their_options():
    values = {**MINIMAL, "tracking": {"trackers": ["wandb"], "project": "p", "samples_every_steps": 5, "prometheus_port": "auto"}}
    config = load_config(values, ["tracking.trackers=[]", "tracking.prometheus_port=0"])
    assert config.tracking.trackers == []
