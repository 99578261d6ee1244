"""All runs below a directory at a glance, and several of them beside each other. Reads files only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from verst.config.load import resolved
from verst.config.schema import Config
from verst.errors import ConfigError, VerstError
from verst.journal.lock import holder_of
from verst.observe.sinks import read_rows
from verst.runtime.changes import differences
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import Best, best_of

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of each run's steps, at which runs are compared."""

_SHAPE = ("run.name", "run.dir")
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run as a list shows it. `state`: running, finished, stopped, or unreadable (`problem` says why).

    `measure` is what `first` and `last` are of: the reward, or the loss where nothing is rewarded.
    """

    path: Path
    state: str
    step: int = 0
    steps: int = 0
    measure: str | None = None
    first: float | None = None
    last: float | None = None
    active: datetime | None = None
    """When anything was last written."""
    disk_bytes: int = 0
    begun_from: str | None = None
    """RUN@STEP, of a run that began from another one's checkpoint."""
    best: Best | None = None
    """The checkpoint that `checkpoint.best` keeps."""
    problem: str | None = None

    def described(self) -> dict[str, Any]:
        active = None if self.active is None else self.active.isoformat(timespec="seconds")
        return asdict(self) | {"path": str(self.path), "active": active}


@dataclass(frozen=True, slots=True)
class MetricCurve:
    """One metric of one run: at the steps that lie `QUANTILES` through it, and its last value."""

    run: Path
    metric: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    final: float | None
    best: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs beside each other. `settings`: each option that is not the same in all of them, with its value in each."""

    runs: tuple[Path, ...]
    curves: tuple[MetricCurve, ...]
    settings: Mapping[str, tuple[Any, ...]]


def find_runs(root: str | Path) -> list[Path]:
    """Run directories at `root` or below it, by path. Raises `ConfigError` if `root` is no directory."""
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"{root} is no directory: give the one that run.dir names (default: runs)")
    return sorted(_runs_below(root, _DEPTH))


def _runs_below(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / "run.json").is_file():
        yield directory
    elif depth:
        for child in directory.iterdir():
            if child.is_dir() and not child.name.endswith(".partial"):
                yield from _runs_below(child, depth - 1)


def summarize(path: Path) -> RunSummary:
    """One run. What is wrong with it becomes its `problem`: a list shows the others all the same."""
    try:
        run, config = RunDirectory.open(path)
        rows = [row for row in _rows(run) if row["kind"] == "step"]
        alive = holder_of(run.root) is not None
        best = best_of(run)
    except (VerstError, OSError, ValueError) as error:
        return RunSummary(path, "unreadable", problem=str(error).splitlines()[0])
    step = max((row["step"] for row in rows), default=0)
    measure = next((name for name in ("reward", "loss/total") if any(row.get(name) is not None for row in rows)), None)
    values = _column(rows, measure)
    written, nbytes = _disk(path)
    lineage = run.lineage
    return RunSummary(
        path,
        "running" if alive else "finished" if step >= config.run.steps else "stopped",
        step,
        config.run.steps,
        measure,
        values[0] if values else None,
        values[-1] if values else None,
        datetime.fromtimestamp(written).astimezone(),
        nbytes,
        None if lineage is None else f"{Path(lineage['run']).name}@{lineage['step']}",
        best,
    )


def compare(paths: Sequence[str | Path], metrics: Sequence[str]) -> Comparison:
    """Metrics of several runs at the same shares of their steps, and the options in which they differ.

    Raises `ConfigError` if a path is no run, or none of the runs has one of the metrics; the message names those that there are.
    """
    opened = [RunDirectory.open(path) for path in paths]
    rows = {run.root: _rows(run) for run, _ in opened}
    known = sorted({name for found in rows.values() for row in found for name, value in row.items() if isinstance(value, float)})
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"none of these runs has a metric {metric!r}; there are: {', '.join(known) or 'none yet'}")
    curves = [_curve(run.root, rows[run.root], metric) for metric in metrics for run, _ in opened]
    return Comparison(tuple(run.root for run, _ in opened), tuple(curves), _differing([config for _, config in opened]))


def _curve(run: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> MetricCurve:
    """A step without the metric (an evaluation is not made in each) shows the last value before it, also one from before the first step."""
    steps: list[int] = []
    seen: list[float | None] = []
    known: float | None = None
    for row in rows:
        known = row[metric] if row.get(metric) is not None else known
        if row["kind"] == "step":
            steps.append(row["step"])
            seen.append(known)
    places = [round(q * (len(steps) - 1)) for q in QUANTILES] if steps else []
    values = _column(rows, metric)
    worse_if_higher = metric.startswith(("loss", "mismatch", "time"))
    best = (min if worse_if_higher else max)(values, default=None)
    return MetricCurve(run, metric, tuple(steps[i] for i in places), tuple(seen[i] for i in places), values[-1] if values else None, best)


def _differing(configs: Sequence[Config]) -> dict[str, tuple[Any, ...]]:
    given = [resolved(config) for config in configs]
    keys = {key for other in given[1:] for key in differences(given[0], other)} - set(_SHAPE)
    flat = [differences({}, values) for values in given]
    return {key: tuple(values.get(key, (None, None))[1] for values in flat) for key in sorted(keys)}


def _rows(run: RunDirectory) -> list[dict[str, Any]]:
    return read_rows(run.metrics) if run.metrics.exists() else []


def _column(rows: Sequence[Mapping[str, Any]], name: str | None) -> list[float]:
    return [row[name] for row in rows if name is not None and row.get(name) is not None]


def _disk(path: Path) -> tuple[float, int]:
    """When anything below a directory was last written, and the bytes that it takes. What vanishes meanwhile is left out."""
    newest, total, seen = path.stat().st_mtime, 0, set()
    for file in path.rglob("*"):
        try:
            about = file.lstat()
        except FileNotFoundError:
            continue
        if about.st_ino not in seen:
            seen.add(about.st_ino)
            total += about.st_blocks * 512
        if file.is_file():
            newest = max(newest, about.st_mtime)
    return newest, total
