"""A new run that begins where another one stood: with its weights, its optimizer's moments and its place in the data.

Steps, policy versions, admission numbers, learning-rate schedule and journal are the new run's own and begin at 0, so nothing in it refers
to the other run: its checkpoint is copied (hard links, where the disk is the same). The new run file decides everything else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst.algorithms.table import ALGORITHMS
from verst.config.plan import read_config
from verst.config.schema import Config
from verst.errors import CheckpointError, ConfigError, ModelError
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import checkpoint_of, committed_digest, parse_reference
from verst.training.checkpoints import Checkpoint, step_path

_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True, slots=True)
class Branch:
    """A verified checkpoint of another run, and where that run stood in its data."""

    run: RunDirectory
    checkpoint: Checkpoint
    digest: str

    @property
    def lineage(self) -> Mapping[str, Any]:
        """What `run.json` of the new run keeps of it."""
        return {"run": str(self.run.root), "run_id": self.run.run_id, "step": self.checkpoint.step, "digest": self.digest}

    def continues(self, stream: Mapping[str, Any]) -> bool:
        """Whether the new run has the same data in the same order, so that it goes on behind what was consumed. `stream`: its start."""
        return self.checkpoint.loop["stream"]["of"] == stream["of"]

    def stream(self, start: Mapping[str, Any]) -> Mapping[str, Any]:
        """Where the new run begins in its data: behind what was consumed, or at the start of other data."""
        return self.checkpoint.loop["stream"] if self.continues(start) else start

    def copy_to(self, origin: Path) -> None:
        """Writes the checkpoint into a new run. Raises `CheckpointError` if it cannot be read any more."""
        target = step_path(origin, 0)
        try:
            shutil.copytree(self.checkpoint.path, target, copy_function=_link_or_copy)
        except shutil.Error as error:
            raise CheckpointError(f"{self.checkpoint.path} could not be copied to {target}: {error}") from error

    def line(self, start: Mapping[str, Any]) -> str:
        """For the person who begins the run."""
        data = "behind the prompts it consumed" if self.continues(start) else "at the start of other data"
        return (
            f"begins from step {self.checkpoint.step} of {self.run.root} (weights {self.digest}), {data}; steps and schedule count from 0"
        )


def open_branch(reference: str, config: Config) -> Branch:
    """The checkpoint that `RUN` or `RUN@STEP` names, for a new run of this configuration.

    Raises:
        ConfigError: there is no such run, or it was trained by another backend, or one of the two has a critic and the other none.
        CheckpointError: there is no checkpoint of that step; the message says of which there are.
        ModelError: the new run's model is another one.
    """
    path, step = parse_reference(reference)
    run, parent = RunDirectory.open(path)
    if parent.train.backend != config.train.backend:
        raise ConfigError(
            f"--from {reference}: that run was trained by {parent.train.backend}, this one has train.backend {config.train.backend}, which "
            f"does not read its checkpoints: set train.backend={parent.train.backend}, or begin from its weights alone: "
            f"verst export {path} --out DIR, then model.path=DIR"
        )
    with_critic = [name for name in (parent.algorithm.name, config.algorithm.name) if ALGORITHMS[name].token_advantages is not None]
    if len(with_critic) == 1:
        raise ConfigError(
            f"--from {reference}: that run was trained by {parent.algorithm.name}, this one has algorithm.name {config.algorithm.name}, "
            f"and only {with_critic[0]} has a critic, whose state is in its checkpoints: begin from that run's weights alone: verst export "
            f"{path} --out DIR, then model.path=DIR"
        )
    _require_same_model(reference, parent.model.path, config.model.path)
    checkpoint = checkpoint_of(run, step)
    return Branch(run, checkpoint, committed_digest(run, checkpoint.step))


def create_run(config: Config, extensions: bytes | None, start: Mapping[str, Any], branch: Branch | None) -> RunDirectory:
    """The directory of a new run, which begins at the start of its data or where the branch does. Raises as `RunDirectory.create`."""
    if branch is None:
        return RunDirectory.create(config, extensions, start)
    return RunDirectory.create(config, extensions, branch.stream(start), branch.lineage, branch.copy_to)


def _require_same_model(reference: str, theirs: str, ours: str) -> None:
    """Compares what the two configs say of the architecture; what they leave out is compared when the checkpoint is loaded."""
    if not (Path(theirs).expanduser() / "config.json").is_file():
        return  # moved away since; loading compares every tensor
    before, now = _architecture(theirs), _architecture(ours)
    differing = [f"{key} {before.get(key)} and {now.get(key)}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        raise ModelError(
            f"--from {reference}: that run trained {theirs}, which is another model than {ours} ({', '.join(differing[:4])}): "
            f"set model.path={theirs}"
        )


def _architecture(path: str) -> dict[str, Any]:
    return {key: value for key, value in read_config(path).items() if key not in _NOT_OF_THE_MODEL}


def _link_or_copy(source: str, target: str) -> None:
    """Checkpoint files are never written to once they are complete, so both runs may have the same ones."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
