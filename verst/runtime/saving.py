"""Checkpoints while training goes on, and the final model.

The trainers copy their state between two steps and write it in the background; the directory appears under its name only when every rank's
file is complete. A checkpoint that cannot be written is told and counted, the former ones stay, and the run goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from verst.config.evaluated import measures_best
from verst.config.schema import Config
from verst.errors import CheckpointError, JournalError
from verst.observe.spans import Spans
from verst.runtime.best import BestKeeper
from verst.runtime.parts import Parts
from verst.runtime.recovery import LoopState
from verst.runtime.stored import checkpoint_steps
from verst.runtime.trainers import TrainersLost
from verst.training.checkpoints import commit_checkpoint, discard_partial


class Saver:
    """Writes a checkpoint every `checkpoint.every_steps`, one at each step that may be the best, and one at the end."""

    def __init__(self, config: Config, parts: Parts, saved: int) -> None:
        self._config = config
        self._parts = parts
        self._writing: asyncio.Task[None] | None = None
        self._directories = [str(parts.run.checkpoints)] * config.train.ranks
        self._saved = saved  # step of the newest checkpoint
        self._best = BestKeeper(config, parts.run)
        self._told_of_size = False  # that the journal stays above its limit: once

    async def after_step(self, state: LoopState) -> None:
        """Begins a checkpoint if one is due, in the trainers' turn. Waits for the one before it, the only cost beside the copy."""
        if state.step % self._config.checkpoint.every_steps == 0 or measures_best(self._config, state.step):
            await self._begin(state)

    async def measured(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What an evaluation has measured with the weights of a step: its checkpoint may be the best of the run."""
        if measures_best(self._config, step):
            await self._settle(self._best.measured, step, metrics)

    async def _settle(self, function: Callable[..., str | None], step: int, *args: Any) -> None:
        note = self._parts.observer.note
        try:
            line = await _to_its_end(function, step, *args)
        except OSError as error:
            record = self._parts.run.best
            note(f"warning: {record} could not be written ({error.strerror}): the former best checkpoint stays, not that of step {step}")
            return
        if line is not None:
            note(line)

    async def finish(self, state: LoopState) -> None:
        """Saves the last state if that is not done yet, waits until it is on disk, and exports the model."""
        await self._written()
        unsaved = state.step > self._saved
        exports = self._config.checkpoint.export_final and state.step >= self._config.run.steps
        if not (unsaved or exports):
            return
        async with self._parts.lease.training(Spans()):
            if unsaved:
                await self._begin(state)
                await self._written()
            if exports:
                await self._parts.trainers.export(str(self._parts.run.final))

    async def abandon(self) -> None:
        """Gives up what is still being written, when the run ends early: nothing may appear in its directory after it has let go of it."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing})

    async def _begin(self, state: LoopState) -> None:
        await self._written()
        try:
            fingerprint = await self._parts.trainers.snapshot(self._directories, state.step)
        except CheckpointError as error:
            self._parts.observer.checkpoint_failed(state.step, error)
            return
        self._writing = asyncio.create_task(self._write(state, fingerprint))

    async def _write(self, state: LoopState, fingerprint: dict) -> None:
        directory = self._parts.run.checkpoints
        loop = {"seq": state.cursor.seq, "stream": state.cursor.stream, "config": self._config.model_dump(mode="json")}
        try:
            records = await self._parts.trainers.written(self._directories)
            retention = {"keep": self._config.checkpoint.keep, "besides": self._best.steps}
            await _to_its_end(commit_checkpoint, directory, state.step, records, fingerprint=fingerprint, loop=loop, **retention)
        except (CheckpointError, TrainersLost) as error:  # whoever works with trainers that were lost finds that out too
            self._parts.observer.checkpoint_failed(state.step, error)
            await asyncio.to_thread(discard_partial, directory, state.step)
        else:
            self._saved = state.step
            self._parts.observer.checkpoint_written(state.step)
            await self._settle(self._best.settle, state.step)
            await self._release_trajectories()

    async def _release_trajectories(self) -> None:
        """Gives up those that no checkpoint needs, if the journal is larger than it may be."""
        limit_bytes, journal = self._config.checkpoint.journal_limit_bytes, self._parts.journal
        if limit_bytes is None or journal.size_bytes <= limit_bytes:
            return
        newest = checkpoint_steps(self._parts.run)[-self._config.checkpoint.keep :]  # a run goes on from these, not from its best one
        oldest, note = min(newest), self._parts.observer.note
        try:
            released = await _to_its_end(journal.give_up, oldest, limit_bytes)
        except JournalError as error:
            note(f"warning: no trajectories were given up: {error}")
            return
        if released:
            note(f"journal: gave up the trajectories of {len(released)} segment(s); it takes {journal.size_bytes} bytes now")
        if journal.size_bytes > limit_bytes and not self._told_of_size:
            self._told_of_size = True
            note(
                f"warning: the journal takes {journal.size_bytes} bytes, above checkpoint.journal_limit_bytes {limit_bytes}: checkpoints "
                "or groups in flight need the rest"
            )

    async def _written(self) -> None:
        if self._writing is not None:
            await self._writing
            self._writing = None


async def _to_its_end(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Runs it in a thread, which nothing can stop: so who is cancelled meanwhile waits for it all the same."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *args, **options))
    try:
        return await asyncio.shield(running)
    finally:
        await asyncio.wait({running})
