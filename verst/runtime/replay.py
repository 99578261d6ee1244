"""`verst replay`: journaled batches of a run trained again, without engines, environments or rewards. The same weights must come out.

Reads the run's directory and changes nothing in it: of a run that has ended, that was killed, or that goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from verst.config.schema import Config
from verst.errors import CheckpointError
from verst.observe.sinks import read_rows
from verst.runtime import batching
from verst.runtime.launch import connect, to_stderr
from verst.runtime.replay_causes import likely_causes
from verst.runtime.replay_plan import Leg, Plan, plan_replay
from verst.runtime.replayed import Replayed, ReplayedStep, compared, span
from verst.runtime.rundir import RunDirectory
from verst.runtime.shown import Echo
from verst.runtime.standalone import device_here, rank_here, ranks_under_ray
from verst.runtime.trainers import Trainers
from verst.runtime.training_step import journaled_groups, train_batch, weights_digest
from verst.training.checkpoints import commit_checkpoint, step_path

StartTrainers = Callable[[Config], AbstractAsyncContextManager[Trainers]]


class Replay:
    """Trains the steps of a plan, one after another. `start` makes the trainers of a configuration, and ends them."""

    def __init__(self, plan: Plan, start: StartTrainers, echo: Echo) -> None:
        self._plan, self._start, self._echo = plan, start, echo
        self._steps: list[ReplayedStep] = []
        rows = read_rows(plan.run.metrics) if plan.run.metrics.exists() else []
        self._recorded = {row["step"]: row for row in rows if row["kind"] == "step" and row["step"] not in plan.measured_again}

    async def run(self) -> Replayed:
        """Trains to the end also behind a difference: how far apart losses go says whether it is rounding.

        Raises:
            CheckpointError: what was restored has not the weights that the journal has of its step, or is of another model.
            VerstError: the trainers cannot be started, or one of them fails.
        """
        plan = self._plan
        for line in self._opening():
            self._echo(line)
        checkpoint = plan.checkpoint
        state = None if checkpoint is None else (checkpoint.path.parent, checkpoint.step)
        with TemporaryDirectory(prefix="verst-replay-") as scratch:
            for number, leg in enumerate(plan.legs):
                if number:
                    self._echo(f"{_means(leg.config)} from here on, as the run from step {leg.begun} on")
                async with self._start(leg.config) as trainers:
                    if state is not None:
                        await _restore(trainers, *state)
                    if not number:
                        await self._check_restored(trainers)
                    kept = await self._train(trainers, leg, Path(scratch) / str(number))
                state = kept or state
        found = Replayed(plan.run.root, plan.begin, plan.to, plan.begun_from, tuple(self._steps))
        first = found.first_difference
        return found if first is None else replace(found, causes=tuple(likely_causes(plan, first)))

    def _opening(self) -> list[str]:
        plan = self._plan
        lines = [f"replays {span(plan.begin + 1, plan.to)} of {plan.run.root} from {plan.begun_from}; {_means(plan.legs[0].config)}"]
        if plan.restored < plan.begin:
            lines.append(f"on the way, without lines of their own: {span(plan.restored + 1, plan.begin)}")
        return [*lines, *plan.notes]

    async def _check_restored(self, trainers: Trainers) -> None:
        step, checkpoint = self._plan.restored, self._plan.checkpoint
        if checkpoint is None or not step:
            return
        digest, committed = await weights_digest(trainers, step), self._plan.journal.commit(step).digest
        if digest != committed:
            raise CheckpointError(
                f"{checkpoint.path} has the weights hash {digest}, but the journal committed {committed} for step {step}: they are not of "
                "one run, or that step was trained twice without run.deterministic. Replay from a step before it"
            )

    async def _train(self, trainers: Trainers, leg: Leg, scratch: Path) -> tuple[Path, int] | None:
        """The steps of a leg. Returns where the state lies that the next one begins with, unless it is that of this one."""
        kept = None
        for step in range(leg.begun + 1, leg.last + 1):
            await self._step(trainers, leg, step)
            if step == leg.hands_over:
                kept = await _saved(trainers, scratch, step)
        return kept

    async def _step(self, trainers: Trainers, leg: Leg, step: int) -> None:
        journal = self._plan.journal
        groups = await asyncio.to_thread(journaled_groups, journal, step, trainers.routed_experts)
        batch = batching.assemble(step, groups, leg.config.algorithm)
        trained = await train_batch(trainers, batch, leg.config, lambda phase: nullcontext())
        digest = await weights_digest(trainers, step)
        if step <= leg.committed:
            return
        now, then = trained.tally.report(), self._recorded.get(step, {})
        done = ReplayedStep(step, digest, journal.commit(step).digest, compared(now), compared(then))
        self._steps.append(done)
        if step > self._plan.begin or not done.same:
            self._echo(done.line())


def replay(path: str | Path, begin: int, to: int | None = None, *, address: str | None = None, echo: Echo | None = None) -> Replayed:
    """Trains steps of a run again from its journal and compares the weights; the same as `verst replay RUN --from BEGIN --to TO`.

    One rank trains in this process, on a GPU if there is one; several have processes of their own under Ray.

    Args:
        begin: the step whose state to begin with; 0: what the run began with. Without a checkpoint of it the newest one before is
            restored, and the steps between are trained on the way.
        to: the last step to train; default: the last one committed now.
        address: HOST:PORT of a Ray cluster with the devices, or "auto"; default: this machine.
        echo: called with each line of progress; default: standard error.

    Raises:
        ConfigError: `path` is no run, or the steps are in the wrong order.
        JournalError: a step was not committed, or its groups are gone.
        CheckpointError: a checkpoint is not of this run.
    """
    run, config = RunDirectory.open(path)
    plan, tell = plan_replay(run, config, begin, to), echo or to_stderr

    def start(leg: Config) -> AbstractAsyncContextManager[Trainers]:
        if address is None and leg.train.ranks == 1:
            return rank_here(leg, device_here())
        return ranks_under_ray(leg, run, tell)

    with contextlib.ExitStack() as opened:
        if address is not None:
            connect(address, opened)
        return asyncio.run(Replay(plan, start, tell).run())


async def _restore(trainers: Trainers, directory: Path, step: int) -> None:
    path = step_path(directory, step)
    try:
        await trainers.restore(str(directory), step)
    except CheckpointError as error:
        if path.exists():
            raise
        raise CheckpointError(f"{path} was removed meanwhile, as a run that goes on does (checkpoint.keep): replay again") from error


async def _saved(trainers: Trainers, directory: Path, step: int) -> tuple[Path, int]:
    """Writes the trainers' state as the run did it before it was resumed."""
    directories = [str(directory)] * trainers.ranks
    fingerprint = await trainers.snapshot(directories, step)
    commit_checkpoint(directory, step, await trainers.written(directories), fingerprint=fingerprint, loop={}, keep=1)
    return directory, step


def _means(config: Config) -> str:
    train = config.train
    return f"{train.backend}, {train.ranks} rank(s), {train.threads} thread(s) each"
