"""Where people look at runs: TensorBoard, Weights & Biases, MLflow, trackio. One small class each, on their own libraries.

Each is opened, used and closed by one thread of its own (`verst.observe.tracking`) and may raise anything. Keys and addresses are theirs to
read from the environment (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`, `HF_TOKEN`); nothing here sees one. A resumed run goes on under its id.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Shown:
    """One trajectory as a row of a table."""

    step: int
    prompt: str
    completion: str
    reward: float | None
    status: str


COLUMNS = tuple(field.name for field in fields(Shown))


@dataclass(frozen=True, slots=True)
class Report:
    """What a tracker gets of one step. Steps only ever rise, also over restarts of a run."""

    step: int
    metrics: Mapping[str, float]
    samples: Sequence[Shown] = ()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker is told of a run when it is opened."""

    name: str
    run_id: str  # the same after a restart, and no other run's
    project: str
    root: Path
    options: Mapping[str, Any]  # by dotted name


class Tracker(Protocol):
    """Takes reports. Its constructor takes the `RunInfo`."""

    def log(self, report: Report) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; a restart adds one. Look with `tensorboard --logdir` of the run or of the directory above it.

    One event a step and on disk at once: the library's own writer keeps what comes for minutes, and a thread that hides its errors.
    """

    def __init__(self, run: RunInfo) -> None:
        writer, self._events, self._summary = _parts("tensorboardX", "event_file_writer", "proto.event_pb2", "summary")
        directory = run.root / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._writer = writer.EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns()}")

    def log(self, report: Report) -> None:
        summary = self._summary.Summary()
        for name, value in report.metrics.items():
            summary.value.add(tag=name, simple_value=value)
        if report.samples:
            summary.MergeFrom(self._summary.text("samples", _markdown(report.samples)))
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=report.step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _parts(package: str, *names: str) -> list[Any]:
    """Modules of a package without the package's own `__init__`.

    TensorboardX's imports PyTorch: 1.5 s of the loop's process, which has no use for it, just when trainer and engine start.
    """
    spec = None if package in sys.modules else find_spec(package)
    if spec is not None:
        sys.modules[package] = module_from_spec(spec)  # not executed; it tells where the modules are
    try:
        return [import_module(f"{package}.{name}") for name in names]
    finally:
        if spec is not None:
            del sys.modules[package]  # whoever imports it gets it whole


class Wandb:
    """Weights & Biases; its files in RUN/wandb. Offline with `WANDB_MODE=offline`. Neither code nor what processes print is sent."""

    def __init__(self, run: RunInfo) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        self._table = wandb.Table
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self._run = wandb.init(
            project=run.project, name=run.name, id=run.run_id, resume="allow", dir=run.root, config=dict(run.options), settings=settings
        )

    def log(self, report: Report) -> None:
        values: dict[str, Any] = dict(report.metrics)
        if report.samples:
            values["samples"] = self._table(columns=list(COLUMNS), data=[list(astuple(shown)) for shown in report.samples])
        self._run.log(values, step=report.step, commit=True)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, at `MLFLOW_TRACKING_URI`; without one in RUN/mlflow.db, sample tables then in RUN/mlflow."""

    def __init__(self, run: RunInfo) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        entities = import_module("mlflow.entities")
        self._metric = entities.Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = import_module("mlflow.tracking").MlflowClient(address or f"sqlite:///{run.root / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name(run.project)
        tables = None if address else (run.root / "mlflow").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project, artifact_location=tables)
        known = self._client.search_runs([number], f"tags.`verst.run_id` = '{run.run_id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, run_name=run.name, tags={"verst.run_id": run.run_id}).info.run_id
            self._client.log_batch(self._id, params=[entities.Param(name, str(value)[:500]) for name, value in run.options.items()])

    def log(self, report: Report) -> None:
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now_ms, report.step) for name, value in report.metrics.items()])
        if report.samples:
            table = {"columns": list(COLUMNS), "data": [list(astuple(shown)) for shown in report.samples]}
            self._client.log_dict(self._id, table, f"samples/step_{report.step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """trackio: in its own local store (`TRACKIO_DIR`), or a Hugging Face Space (`TRACKIO_SPACE_ID`), which is made private."""

    def __init__(self, run: RunInfo) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        trackio = import_module("trackio")
        self._table = trackio.Table
        self._run = trackio.init(  # which knows runs by name only
            project=run.project,
            name=f"{run.name}-{run.run_id[:8]}",
            resume="allow",
            config=dict(run.options),
            private=True,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, report: Report) -> None:
        values: dict[str, Any] = dict(report.metrics)
        if report.samples:
            values["samples"] = self._table(columns=list(COLUMNS), data=[list(astuple(shown)) for shown in report.samples])
        self._run.log(values, step=report.step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[RunInfo], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""What each tracker imports."""


def _markdown(samples: Sequence[Shown]) -> str:
    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>")

    rows = [COLUMNS, ("---",) * len(COLUMNS), *([cell(value) for value in astuple(shown)] for shown in samples)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
