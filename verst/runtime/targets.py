"""What `verst eval` is asked to measure: models and runs by name, and the sets for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verst import secrets
from verst.config.hub import is_hub_id, model_directory
from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.runtime.evaluation import EvalSet
from verst.runtime.exporting import export_run
from verst.runtime.extensions import Extensions
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import parse_reference


@dataclass(frozen=True, slots=True)
class Target:
    """A model directory, by the name it was given as, and what it is measured on."""

    name: str
    model: Path
    sets: tuple[EvalSet, ...]


def measured_targets(words: Sequence[str], files: Sequence[str], overrides: Sequence[str], scratch: Path) -> Iterator[Target]:
    """One target for each word: a model directory or hub id, or `RUN` or `RUN@STEP`, whose weights are exported below `scratch`.

    `files` are `NAME=FILE` of run files. Without any, a run has the set of its own data, and a model needs overrides that say one
    (`data.task=…`). The modules that a run names are looked for where the run began.

    Raises `ConfigError` if a word is neither, or there is nothing to measure it on.
    """
    if not words:
        raise ConfigError("nothing to measure: give a model directory or a run")
    _find_modules([os.getcwd()])
    for number, word in enumerate(words):
        path, step = (Path(word), None) if is_hub_id(word) else parse_reference(word)
        if (path / "run.json").is_file():
            run, config = RunDirectory.open(path)
            _find_modules(run.module_path)
            model = _model_of(run, step, scratch / f"model-{number}")
            own = _own_set(run, config, overrides)
        elif is_hub_id(word) or ((path / "config.json").is_file() and step is None):
            with secrets.lent():
                model, own = model_directory(word), None
        else:
            raise ConfigError(
                f"{word} is neither a run nor a Hugging Face model directory (it has no run.json and no config.json): give one"
            )
        sets = tuple(_set(file, model, overrides) for file in files) or (own or _described(model, overrides),)
        yield Target(word, model, sets)


def _model_of(run: RunDirectory, step: int | None, scratch: Path) -> Path:
    return export_run(run.root, scratch, step).path


def _own_set(run: RunDirectory, config: Config, overrides: Sequence[str]) -> EvalSet:
    packed = run.extensions.read_bytes() if run.extensions.exists() else None
    return EvalSet.of("held-out" if config.data.holdout else "all prompts", config, overrides, Extensions.unpack(packed))


def _set(word: str, model: Path, overrides: Sequence[str]) -> EvalSet:
    name, sign, file = word.partition("=")
    if not (sign and name and file):
        raise ConfigError(f"--set {word}: give NAME=FILE, such as --set math=math.yaml")
    return EvalSet.of(name, load_config(Path(file), [f"model.path={model}"]), overrides)


def _described(model: Path, overrides: Sequence[str]) -> EvalSet:
    if not any(word.startswith(("data.task=", "data.path=", "data.dataset=")) for word in overrides):
        raise ConfigError(
            f"{model}: a model alone has no prompts. Give --set NAME=FILE, or data.task=… (data.path=…, data.dataset=…) and "
            "reward.function=…"
        )
    base = load_config({"run": {"steps": 1}, "model": {"path": str(model)}})
    return EvalSet.of("prompts", base, overrides)


def _find_modules(paths: Sequence[str]) -> None:
    """In this process, where environments run, and in those that it starts, where rewards do."""
    fresh = [path for path in paths if path not in sys.path]
    sys.path[:0] = fresh
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join([*(path for path in fresh if path not in known), *known])
