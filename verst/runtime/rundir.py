"""A run's directory: everything that must outlive its processes.

RUN/config.yaml      the resolved configuration
RUN/run.json         run id, format, lineage, what it began with: packages, directory, module path, state of the data; later changes
RUN/extensions.pkl   functions given from Python (only then)
RUN/journal/         groups, batches, commits
RUN/checkpoints/     the last ones
RUN/origin/          the checkpoint of another run that this one began from (only then)
RUN/logs/            what user code and engine servers print; run.log: the run's own lines; stacks-….txt: what processes stood in
RUN/metrics.jsonl    one row a step and one an evaluation
RUN/timeline.jsonl   who worked when; timeline.1.jsonl: the former part of a long one
RUN/report.png       the picture at the end
RUN/tensorboard/     event files; with those trackers also wandb/, mlflow.db and mlflow/
RUN/best.json        the checkpoint that `checkpoint.best` keeps: step, metric and value (only with that option)
RUN/final/           the trained model, a Hugging Face directory
RUN/scale.json       how many replicas `verst scale` asks for, and RUN/scale-answer.json what came of it (only if it was asked)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verst.config.algorithms import AlgorithmConfig, DistillConfig, PpoConfig
from verst.config.hub import pinned
from verst.config.load import dump_config, load_config
from verst.config.schema import Config, EvalSetConfig
from verst.errors import ConfigError
from verst.journal.lock import LOCK_NAME, RunLock
from verst.journal.log import Journal, JournalReader

FORMAT = 2

_NEEDED = ("run_id", "stream", "cwd", "module_path")
_FROM_A_COPY = "put it back from a copy; without it the run cannot be continued"


@dataclass(frozen=True)
class RunDirectory:
    """Paths below one run's directory."""

    root: Path

    def discard_unbegun(self) -> None:
        """Removes a run that could not start, so that it can be started once what was wrong is mended. One with a group or a step stays."""
        index = JournalReader(self.journal, self.run_id).index
        if not index.groups and not index.last_commit:
            shutil.rmtree(self.root, ignore_errors=True)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def extensions(self) -> Path:
        return self.root / "extensions.pkl"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def origin(self) -> Path:
        """Where the checkpoint lies that a run with a lineage began from, as that of its step 0."""
        return self.root / "origin"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        return self.root / "timeline.jsonl"

    @property
    def logs(self) -> Path:
        """What rewards and engine servers print."""
        return self.root / "logs"

    @property
    def log(self) -> Path:
        """What the run told, line by line, for those who look later."""
        return self.logs / "run.log"

    @property
    def report(self) -> Path:
        return self.root / "report.png"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def best(self) -> Path:
        return self.root / "best.json"

    @property
    def scale_request(self) -> Path:
        return self.root / "scale.json"

    @property
    def scale_answer(self) -> Path:
        return self.root / "scale-answer.json"

    @property
    def run_id(self) -> str:
        return self._described()["run_id"]

    @property
    def stream(self) -> Mapping[str, Any]:
        """State of the prompt stream before the run's first prompt."""
        return self._described()["stream"]

    @property
    def lineage(self) -> Mapping[str, Any] | None:
        """`{"run": directory, "run_id": …, "step": N, "digest": weights hash}` of the run it began from; None: it began from a model."""
        return self._described().get("lineage")

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions that the run began with, by package."""
        return self._described().get("packages", {})

    @property
    def cwd(self) -> Path:
        """The directory the run began in."""
        return Path(self._described()["cwd"])

    @property
    def module_path(self) -> list[str]:
        """Where the run's processes look for modules first: in the directory the run began in, then on the PYTHONPATH of then and now."""
        return list(dict.fromkeys([*self._described()["module_path"], *_python_path()]))

    @property
    def changes(self) -> Sequence[Mapping[str, Any]]:
        """What `change` has recorded: `{"at": time, "step": last one committed, "checkpoint": step that the run goes on from, if it had
        ended, "options": {name: [before, after]}}` each.
        """
        return self._described().get("changes", [])

    def change(self, config: Config, options: Mapping[str, tuple[Any, Any]], *, step: int, checkpoint: int | None = None) -> None:
        """Gives the run another configuration from here on, and records which options changed (see `changes`). The caller holds the lock.

        Raises `ConfigError` if it cannot be written; the run is then as it was, or has the record without the configuration.
        """
        described = self._described()
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        begins = {} if checkpoint is None else {"checkpoint": checkpoint}
        described["changes"] = [*self.changes, {"at": at, "step": step, **begins, "options": options}]
        for path, content in ((self.root / "run.json", _json(described)), (self.config, dump_config(config).encode())):
            try:
                replace_file(path, content)
            except OSError as error:
                raise ConfigError(
                    f"{path} could not be written ({error.strerror}): make room or rights there, then resume again"
                ) from error

    def _described(self) -> dict[str, Any]:
        path = self.root / "run.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): {_FROM_A_COPY}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} holds no JSON object: {_FROM_A_COPY}")
        return found

    @classmethod
    def create(
        cls,
        config: Config,
        extensions: bytes | None,
        stream: Mapping[str, Any],
        lineage: Mapping[str, Any] | None = None,
        fill_origin: Callable[[Path], None] | None = None,
    ) -> RunDirectory:
        """Makes the directory of a new run, as NAME.partial until it is complete. `stream`, `lineage`: see the properties.

        `fill_origin` is called to write the directory `origin`.

        Raises:
            ConfigError: there is one already (a run is never written over), or it cannot be written.
            RunLocked: another process is making it at this moment.
        """
        root = Path(config.run.dir).expanduser().absolute() / config.run.name
        _require_free(root)
        partial = cls(root.with_name(f"{root.name}.partial"))
        with _told(partial.root), RunLock(partial.root):
            partial._clear()
            if fill_origin is not None:
                fill_origin(partial.origin)
            partial._fill(config, extensions, stream, lineage)
            _require_free(root)
            partial.root.rename(root)
        return cls(root)

    def _clear(self) -> None:
        """Removes what a start that was killed left; the lock file is in use."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()

    def _fill(self, config: Config, extensions: bytes | None, stream: Mapping[str, Any], lineage: Mapping[str, Any] | None) -> None:
        cwd = os.getcwd()
        described = {
            "format": FORMAT,
            "run_id": uuid.uuid4().hex,
            "packages": {name: version(name) for name in ("torch", "transformers", "ray", "numpy")},
            "cwd": cwd,
            "module_path": [cwd, *_python_path()],
            "stream": stream,
            **({} if lineage is None else {"lineage": lineage}),
        }
        self.checkpoints.mkdir()
        self.logs.mkdir()
        self.log.touch()
        if extensions is not None:
            _write(self.extensions, extensions)
        _write(self.config, dump_config(_anchored(config)).encode())
        Journal.create(self.journal, str(described["run_id"])).close()
        _write(self.root / "run.json", _json(described))

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunDirectory, Config]:
        """An existing run and its configuration. Raises `ConfigError` if the path is no run."""
        run = cls(Path(path).expanduser().absolute())
        if not os.path.isfile(run.root / "run.json"):
            hint = "; a step behind @ is for `verst eval` and `verst train --from`" if "@" in run.root.name else ""
            raise ConfigError(f"{run.root} is {_kind(run.root)}, not a run; runs are made by `verst train`, in run.dir{hint}")
        described = run._described()
        found = described.get("format")
        if found != FORMAT:
            raise ConfigError(
                f"{run.root} has run format {found}, this Verst reads format {FORMAT}: resume it with the version that made it"
            )
        lacking = [name for name in _NEEDED if name not in described]
        if lacking:
            raise ConfigError(f"{run.root / 'run.json'} has no {', '.join(lacking)}: {_FROM_A_COPY}")
        if not os.path.lexists(run.config):
            raise ConfigError(f"{run.config} is missing: {_FROM_A_COPY}")
        return run, load_config(run.config)


def _require_free(root: Path) -> None:
    """Raises `ConfigError` that says what is in the run's place."""
    if not os.path.lexists(root):
        return
    if (root / "run.json").is_file():
        raise ConfigError(f"{root} exists already: continue it with `verst resume {root}`, or choose another run.name, or remove it")
    raise ConfigError(f"{root} exists already and is no run but {_kind(root)}: choose another run.name or run.dir, or remove it")


def _kind(path: Path) -> str:
    if os.path.isdir(path):
        try:
            return "a directory without run.json" if any(path.iterdir()) else "an empty directory"
        except OSError as error:
            return f"a directory that cannot be read ({error.strerror})"
    if os.path.isfile(path):
        return "a file"
    return "a broken link or a special file" if os.path.lexists(path) else "nothing that exists"


@contextlib.contextmanager
def _told(partial: Path) -> Iterator[None]:
    """Turns a full disk, a read-only one or missing rights into a diagnosis, and leaves nothing half made behind."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            f"run.dir: cannot make {error.filename or partial} ({error.strerror}): make room or rights there, or set another run.dir"
        ) from error


def _write(path: Path, content: bytes) -> None:
    """Writes a file that is on disk when this returns, before the directory gets its name."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that is there in its old or its new form, whole, at every moment."""
    partial = path.with_name(f"{path.name}.partial")
    _write(partial, content)
    partial.rename(path)


def _json(described: Mapping[str, Any]) -> bytes:
    return (json.dumps(described, indent=1) + "\n").encode()


def _python_path() -> list[str]:
    return [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _dataset(name: str | None) -> str | None:
    """A directory as an absolute path; any other name is one on the hub."""
    return str(Path(name).expanduser().absolute()) if name and Path(name).expanduser().is_dir() else name


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _anchored_set(chosen: EvalSetConfig) -> EvalSetConfig:
    return chosen.model_copy(update={"path": _absolute(chosen.path), "dataset": _dataset(chosen.dataset)})


def _anchored_algorithm(algorithm: AlgorithmConfig) -> AlgorithmConfig:
    if isinstance(algorithm, PpoConfig):
        return algorithm.model_copy(update={"critic_path": _absolute(algorithm.critic_path)})
    return algorithm.model_copy(update={"teacher": pinned(algorithm.teacher)}) if isinstance(algorithm, DistillConfig) else algorithm


def _anchored(config: Config) -> Config:
    """The configuration with absolute paths, so that the run can be resumed from any directory, and with the commits of hub ids."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": _absolute(config.run.dir)}),
            "model": config.model.model_copy(update={"path": pinned(config.model.path)}),
            "algorithm": _anchored_algorithm(config.algorithm),
            "data": config.data.model_copy(update={"path": _absolute(config.data.path), "dataset": _dataset(config.data.dataset)}),
            "eval": config.eval.model_copy(update={"sets": {name: _anchored_set(one) for name, one in config.eval.sets.items()}}),
            "weights": config.weights.model_copy(update={"location": _absolute(config.weights.location)}),
        }
    )
