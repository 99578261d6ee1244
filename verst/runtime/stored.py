"""What lies in a run's directory, found again: its checkpoints by step, and the run that it began from.

`RUN@STEP` names a checkpoint on the command line, `RUN@best` the one that `checkpoint.best` keeps; without `@STEP` it is the newest one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from verst.errors import CheckpointError, ConfigError, JournalError
from verst.journal.log import JournalReader
from verst.runtime.rundir import RunDirectory
from verst.training.checkpoints import Checkpoint, latest_checkpoint, step_path, verified

_FROM_A_COPY = "Put it back from a copy"


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint that `checkpoint.best` keeps: its step, and the value that the metric had with its weights."""

    metric: str
    step: int
    value: float


def best_of(run: RunDirectory) -> Best | None:
    """As RUN/best.json has it; None: there is none (yet). Raises `ConfigError` if it cannot be read."""
    if not run.best.exists():
        return None
    try:
        return Best(**json.loads(run.best.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{run.best} cannot be read ({error}): put it back from a copy, or remove it") from error


def parse_reference(reference: str) -> tuple[Path, int | None]:
    """`RUN`, `RUN@STEP` or `RUN@best`. Raises `ConfigError` if what follows the last @ is neither, unless a directory has that name."""
    path, at, step = reference.rpartition("@")
    if not at or Path(reference).is_dir():
        return Path(reference), None
    if step == "best":
        best = best_of(RunDirectory(Path(path)))
        if best is None:
            raise ConfigError(f"{reference}: {path} has no best checkpoint; checkpoint.best says by which metric one is kept")
        return Path(path), best.step
    if not step.isdecimal():
        raise ConfigError(f"{reference}: what follows @ is a step, a whole number, as in {path}@40, or the word best")
    return Path(path), int(step)


def checkpoint_steps(run: RunDirectory) -> list[int]:
    """The steps of which there are checkpoints, ascending."""
    numbers = (path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def checkpoint_of(run: RunDirectory, step: int | None) -> Checkpoint:
    """The checkpoint of one step (None: the newest that is whole), every byte verified.

    Raises `CheckpointError` that says which steps there are, or what is wrong with it.
    """
    steps = checkpoint_steps(run)
    if step is None:
        checkpoint, skipped = latest_checkpoint(run.checkpoints)
        if checkpoint is not None:
            return checkpoint
        if skipped:
            raise CheckpointError(
                f"{run.root} has no whole checkpoint: {'; '.join(skipped)}. {_FROM_A_COPY}, or resume the run to make one"
            )
        raise CheckpointError(f"{run.root} has no checkpoint yet: checkpoint.every_steps and the end of a run make them; resume it")
    if step not in steps:
        there = f"its checkpoints are of: {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise CheckpointError(
            f"{run.root} has no checkpoint of step {step}: {there}. checkpoint.every_steps says how often one is made, checkpoint.keep how "
            "many stay"
        )
    path = step_path(run.checkpoints, step)
    try:
        found = verified(path)
        if found.step != step:
            raise CheckpointError(f"{path} holds the checkpoint of step {found.step}: a directory was renamed")
        return found
    except CheckpointError as error:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise CheckpointError(f"{error}. {_FROM_A_COPY}, or take the checkpoint of another step ({others})") from error


def newest_state(run: RunDirectory, up_to: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The state to go on from: the newest whole checkpoint, else the one the run began with, as step 0; None is the initial model.

    `up_to` leaves out those of later steps. With warnings of those that were skipped.

    Raises `CheckpointError` if the run began from another run's checkpoint and its copy is not whole.
    """
    checkpoint, warnings = _newest(run, up_to)
    if checkpoint is not None or run.lineage is None:
        return checkpoint, warnings
    return replace(verified(step_path(run.origin, 0)), step=0), warnings


def _newest(run: RunDirectory, up_to: int | None) -> tuple[Checkpoint | None, list[str]]:
    if up_to is None:
        return latest_checkpoint(run.checkpoints)
    warnings: list[str] = []
    for step in reversed([step for step in checkpoint_steps(run) if step <= up_to]):
        try:
            return checkpoint_of(run, step), warnings
        except CheckpointError as error:
            warnings.append(f"checkpoint skipped: {error}")
    return None, warnings


def committed_digest(run: RunDirectory, step: int) -> str:
    """The weights hash that the journal has of a step. Raises `JournalError` if that step was not committed."""
    journal = JournalReader(run.journal, run.run_id)
    if step not in journal.index.commits:
        raise JournalError(f"{run.root}: step {step} was not committed; the last commit is of step {journal.index.last_commit}")
    return journal.commit(step).digest
