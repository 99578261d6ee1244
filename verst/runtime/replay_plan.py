"""What a replay has to train: from which state, which steps, and on which ranks and threads each of them.

A run that was resumed on other ranks went on from its checkpoint. What had been committed since was trained again there, came out the same
up to rounding only, and the later steps are built on that. A replay goes the same way, in legs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verst.config.schema import Config
from verst.errors import CheckpointError, ConfigError, JournalError
from verst.journal.log import JournalReader
from verst.runtime.changes import Stretch, stretches
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import checkpoint_steps, newest_state
from verst.training.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True)
class Leg:
    """Steps `begun` + 1 to `last`, trained with one configuration.

    Those beyond `committed` must reach the committed weights. `hands_over`: the step whose state the next leg begins with.
    """

    config: Config
    begun: int
    committed: int
    last: int
    hands_over: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps `begin` + 1 to `to` of a run, and those to train before. `journal` stays as it was when it was opened."""

    run: RunDirectory
    config: Config
    journal: JournalReader
    begin: int
    to: int
    checkpoint: Checkpoint | None
    legs: tuple[Leg, ...]
    notes: tuple[str, ...]
    measured_again: frozenset[int]
    """Steps whose recorded metrics are those of a second training, on other ranks."""

    @property
    def restored(self) -> int:
        """The step whose state is restored; 0: what the run began with."""
        return self.legs[0].begun

    @property
    def begun_from(self) -> str:
        """What is restored, in words."""
        if self.checkpoint is None:
            return "the initial model"
        return f"the checkpoint of step {self.restored}" if self.restored else "the checkpoint that the run began from"


def plan_replay(run: RunDirectory, config: Config, begin: int, to: int | None) -> Plan:
    """Chooses the newest checkpoint at or before `begin`, and how to go on from there. `to` None: the last commit there is now.

    Raises:
        ConfigError: the steps are none, or in the wrong order.
        JournalError: a step was not committed, or its groups are gone; or the journal is damaged or of another run.
        CheckpointError: the run began from another run's checkpoint, and its copy is not whole.
    """
    journal = JournalReader(run.journal, run.run_id)
    to = _last_step(run, journal, begin, to)
    found = stretches(run, config)
    checkpoint, notes = _start(run, found, begin)
    if journal.torn:
        notes.append(f"journal: {journal.torn}")
    legs = _legs(run, found, 0 if checkpoint is None else checkpoint.step, begin, to)
    _require_groups(run, journal, range(legs[0].begun + 1, to + 1))
    again = frozenset(step for stretch in found for step in range(stretch.begun + 1, stretch.committed + 1))
    return Plan(run, config, journal, begin, to, checkpoint, tuple(legs), tuple(notes), again)


def _last_step(run: RunDirectory, journal: JournalReader, begin: int, to: int | None) -> int:
    last = journal.index.last_commit
    if begin < 0:
        raise ConfigError(f"--from {begin}: give a step whose state to begin with, from 0 (what the run began with) on")
    if to is not None and to <= begin:
        raise ConfigError(
            f"--to {to} does not come after --from {begin}, which is the step whose state is restored; --to is the last one trained"
        )
    if not last:
        raise JournalError(f"{run.root} has no committed step yet: there is nothing to replay")
    if begin >= last or (to is not None and to > last):
        wrong = f"--to {to}" if to is not None and to > last else f"--from {begin}"
        raise JournalError(f"{wrong}: the last committed step of {run.root} is {last}; give --from below {last}, and --to up to {last}")
    return last if to is None else to


def _start(run: RunDirectory, found: Sequence[Stretch], begin: int) -> tuple[Checkpoint | None, list[str]]:
    """The state to begin with. One of a step that was trained twice, on different ranks, does not say of which time it is."""
    notes: list[str] = []
    limit = begin
    while True:
        checkpoint, warnings = newest_state(run, limit)
        notes += warnings
        if checkpoint is None or not any(stretch.begun < checkpoint.step <= stretch.committed for stretch in found):
            return checkpoint, notes
        notes.append(
            f"checkpoint of step {checkpoint.step} skipped: that step was trained twice, on other ranks or threads the second time"
        )
        limit = checkpoint.step - 1


def _legs(run: RunDirectory, found: Sequence[Stretch], restored: int, begin: int, to: int) -> list[Leg]:
    first = max(i for i, stretch in enumerate(found) if stretch.begun <= restored and stretch.committed <= begin)
    chosen = [stretch for stretch in found[first:] if stretch.committed < to]
    legs: list[Leg] = []
    begun = restored
    for stretch, following in zip(chosen, [*chosen[1:], None], strict=True):
        if following is None:
            legs.append(Leg(stretch.config, begun, stretch.committed, to))
            break
        if following.begun < begun:
            raise CheckpointError(
                f"{run.root} went back to step {following.begun} as it was resumed on other ranks or threads, and then to the older of two "
                f"checkpoints: that cannot be followed. Replay from a step after {following.committed}"
            )
        compares = following.committed > max(stretch.committed, begin)
        last = following.committed if compares else following.begun
        if last > begun:
            legs.append(Leg(stretch.config, begun, stretch.committed, last, following.begun))
        begun = following.begun
    return legs


def _require_groups(run: RunDirectory, journal: JournalReader, steps: range) -> None:
    """Raises `JournalError` before anything is trained, if groups of these steps were given up."""
    gone = [step for step in steps if not all(journal.keeps(seq) for seq in journal.batch(step).groups)]
    if gone:
        later = [step for step in checkpoint_steps(run) if step >= gone[-1]]
        instead = f"give --from {later[0]} or later" if later else "no checkpoint comes after it"
        raise JournalError(
            f"{run.root}: the groups of step {gone[-1]} were given up by retention (checkpoint.journal_limit_bytes), so it cannot be "
            f"trained again; {instead}"
        )
