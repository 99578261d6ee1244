"""What a run knows when it starts: nothing, or what checkpoint and journal tell.

The checkpoint restores the trainer and says where the feed has to go on. The journal then says which batches were made since (they are
trained again, and must reach the weights that were committed), and which groups were finished but never trained (they are trained, not
generated again). Everything else is rolled anew.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verst.runtime.changes import reordered_since
from verst.runtime.stored import newest_state
from verst.training.snapshots import KEPT

if TYPE_CHECKING:
    from verst.runtime.parts import Parts


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the feed goes on: the next admission number, and the prompt stream's state before that prompt is read."""

    seq: int
    stream: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoopState:
    """The loop's part of a checkpoint."""

    step: int
    cursor: Cursor  # of the oldest group that no batch has consumed


@dataclass(frozen=True, slots=True)
class JournaledBatch:
    """A step to train again. `digest`: the weights hash it must reach; None if it was never committed."""

    step: int
    groups: tuple[int, ...]
    digest: str | None


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a run begins."""

    step: int  # the policy version that the trainer holds
    cursor: Cursor
    batches: tuple[JournaledBatch, ...] = ()
    finished: frozenset[int] = frozenset()  # in the journal and in no batch
    consumed: frozenset[int] = frozenset()  # in a batch, or dropped by one; from the cursor on
    saved: int = 0  # the step of the newest checkpoint
    same_sums: bool = True  # steps trained again add numbers in the same order as the first time: on the same ranks and threads


async def recover(parts: Parts) -> Restored:
    """Restores trainer and prompt stream, and says what remains to be done.

    Raises:
        CheckpointError: the checkpoint is of another model.
        JournalError: journal and checkpoint do not belong together.
    """
    note, journal = parts.observer.note, parts.journal
    for line in (journal.torn, *journal.remade):
        if line:
            note(f"journal: {line}")
    checkpoint, warnings = await asyncio.to_thread(newest_state, parts.run)
    for warning in warnings:
        note(f"warning: {warning}")
    saved, cursor = 0 if checkpoint is None else checkpoint.step, Cursor(0, parts.stream.state())
    step = await _from_memory(parts, saved)
    source = "memory" if step is not None else "initial model" if checkpoint is None else "checkpoint"
    if step is None:
        step = saved
        if checkpoint is not None:
            await parts.trainers.restore(str(checkpoint.path.parent), checkpoint.step)
    if checkpoint is not None and saved:
        cursor = Cursor(checkpoint.loop["seq"], checkpoint.loop["stream"])
        parts.stream.restore(cursor.stream)
    todo = journal.recovery(step)
    batches = tuple(JournaledBatch(s, journal.batch(s).groups, digest) for s, digest in todo.retrain)
    finished = frozenset(todo.pending)
    if journal.index.groups:
        note(f"resumed at step {step} ({source}): {len(batches)} journaled steps to train again, {len(finished)} finished groups to train")
    changed = reordered_since(parts.run, step)
    if changed:
        note(f"{', '.join(sorted(changed))} changed since: those steps will have the same weights up to rounding, not bit for bit")
    consumed = frozenset(journal.index.groups.since(cursor.seq)) - finished  # those before are not fed again
    return Restored(step, cursor, batches, finished, consumed, same_sums=not changed, saved=saved)


async def _from_memory(parts: Parts, saved: int) -> int | None:
    """The step of a snapshot that the trainers were restored from, if a former process has left one that is newer than the checkpoint."""
    journal = parts.journal
    last = journal.index.last_commit
    if last <= saved:
        return None
    parts.snapshots.expect({step: journal.commit(step).digest for step in range(max(saved + 1, last - KEPT), last + 1)})
    return await parts.snapshots.restore(last, newer_than=saved)
