"""A run's directory: everything that must outlive its processes.

RUN/config.yaml      the resolved configuration
RUN/run.json         run id, format, versions of the packages it began with
RUN/extensions.pkl   functions given from Python (only then)
RUN/journal/         groups, batches, commits
RUN/checkpoints/     the last ones
RUN/metrics.jsonl    one row a step and one an evaluation
RUN/report.png       the picture at the end
RUN/final/           the trained model, a Hugging Face directory
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from verst.config.load import dump_config, load_config
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.journal.log import Journal

FORMAT = 1


@dataclass(frozen=True)
class RunDirectory:
    """Paths below one run's directory."""

    root: Path

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
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def reward_log(self) -> Path:
        return self.root / "reward.log"

    @property
    def report(self) -> Path:
        return self.root / "report.png"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def run_id(self) -> str:
        return self._described()["run_id"]

    def _described(self) -> dict[str, str]:
        return json.loads((self.root / "run.json").read_text(encoding="utf-8"))

    @classmethod
    def create(cls, config: Config, extensions: bytes | None) -> RunDirectory:
        """Makes the directory of a new run. Raises `ConfigError` if there is one already: a run is never written over."""
        run = cls(Path(config.run.dir).expanduser().absolute() / config.run.name)
        try:
            run.root.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(
                f"{run.root} exists already: continue it with `verst resume {run.root}`, or choose another run.name, or remove it"
            ) from None
        except OSError as error:
            raise ConfigError(f"run.dir: cannot make {run.root}: {error.strerror}") from error
        run.checkpoints.mkdir()
        if extensions is not None:
            run.extensions.write_bytes(extensions)
        run.config.write_text(dump_config(_anchored(config)), encoding="utf-8")
        packages = {name: version(name) for name in ("torch", "transformers", "ray", "numpy")}
        described = {"format": FORMAT, "run_id": uuid.uuid4().hex, "packages": packages}
        Journal.create(run.journal, str(described["run_id"])).close()
        partial = run.root / "run.json.partial"
        partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, run.root / "run.json")  # last: a directory without run.json is not a run
        return run

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunDirectory, Config]:
        """An existing run and its configuration. Raises `ConfigError` if the path is no run."""
        run = cls(Path(path).expanduser().absolute())
        if not (run.root / "run.json").is_file():
            raise ConfigError(f"{run.root} is not a run directory (it has no run.json); runs are made by `verst train`, in run.dir")
        found = run._described().get("format")
        if found != FORMAT:
            raise ConfigError(
                f"{run.root} has run format {found}, this Verst reads format {FORMAT}: resume it with the version that made it"
            )
        return run, load_config(run.config)


def _anchored(config: Config) -> Config:
    """The configuration with absolute paths, so that the run can be resumed from any directory."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": absolute(config.run.dir)}),
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "data": config.data.model_copy(update={"path": absolute(config.data.path)}),
            "weights": config.weights.model_copy(update={"location": absolute(config.weights.location)}),
        }
    )
