"""The loop: producers and one consumer around a bounded set of group slots.

    who        takes               gives                 waits for                        unblocked by
    read       the data            prompts               room for one                     feed
    feed       a prompt, a slot    admitted prompts      a free slot                      pull
    roll x C   an admitted prompt  a scored, journaled   a prompt; engine and scorer      feed
                                   group
    consumer   the next P groups   a committed step      its groups, by the window        roll
    pull       a committed version freed slots           every engine's verified pull     consumer
    replace    a lost replica      a new one             its engine to start              roll, pull

C is the capacity, P the groups of a step. Synchronous training is C = P: nothing is admitted until the engines hold the step's weights. A
larger C lets rollout run ahead. There are no modes: the same lines run either way. Where trainer and engines share devices, a step up to
its checkpoint is the trainers' turn on them, and the pull waits for its end (`verst.runtime.lease`).

The commit precedes the pull, so engines never serve a version that a crash could take back. A producer that ends is an error. A failed
trajectory is data; a broken invariant stops the run. Trainer ranks that die take the step in progress with them: the consumer brings them
back to the last commit and does that step again (`verst.runtime.revival`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from verst.algorithms.own import own_advantages
from verst.algorithms.table import algorithm_for
from verst.config.evaluated import due
from verst.config.schema import Config
from verst.errors import DataError, InvariantViolation, VerstError
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord
from verst.observe.metrics import Tally
from verst.observe.spans import Spans
from verst.runtime import batching
from verst.runtime.bias import Bias
from verst.runtime.intake import Intake
from verst.runtime.parts import Parts
from verst.runtime.publisher import Publisher
from verst.runtime.recovery import Cursor, JournaledBatch, LoopState, Restored
from verst.runtime.revival import Revival
from verst.runtime.saving import Saver
from verst.runtime.slots import GroupSlots, Ready
from verst.runtime.standing import Standing
from verst.runtime.trainer_worker import Published
from verst.runtime.trainers import TrainersLost
from verst.runtime.training_step import journaled_groups, train_batch
from verst.types import Batch, Estimates, Group, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trained:
    """What the updates of a step came to, before they are committed."""

    advantages: Estimates
    tally: Tally
    published: Published


class Loop:
    """One run. Everything it works with is in `parts`; everything it knows after a crash comes from `restored`."""

    def __init__(self, config: Config, parts: Parts, restored: Restored) -> None:
        self._config = config
        self._parts = parts
        self._restored = restored
        self._algorithm = algorithm_for(config.algorithm)
        own_advantages(config.algorithm)  # loads them: a mistake in a user's module should not cost the first batch
        self._slots = GroupSlots(config.capacity_groups)
        self._admitted: asyncio.Queue[tuple[int, Prompt]] = asyncio.Queue()
        self._ready = Ready(config.rollout.window_groups)
        self._cursors: dict[int, Cursor] = {}  # where to feed from again, for each admitted group that no batch has consumed
        self._next = restored.cursor  # of the next prompt to admit
        self._unread: asyncio.Queue[tuple[Cursor, Cursor, Prompt | DataError]] = asyncio.Queue(config.capacity_groups)
        self._bias = Bias()
        self._stop = asyncio.Event()
        self._standing = Standing(self._slots, parts.replicas, parts.keep_stacks)
        self._intake = Intake(config, parts, self._ready, self._standing, self._give_up, restored.finished)
        self._publisher = Publisher(config, parts, self._standing, self._free, restored.step)
        self._saver = Saver(config, parts, saved=restored.saved)
        self._revival = Revival(parts)
        self._spans = Spans()  # of the step in progress
        self.version = restored.step

    def stop(self) -> None:
        """Asks the loop to end at the next consistent point: after the step in progress, or at once while it waits for groups."""
        self._stop.set()

    async def standing(self) -> list[str]:
        """Who waits for whom now, in a few lines, and where the stacks of all processes are."""
        return await self._standing.told("asked for")

    async def run(self) -> None:
        """Trains until `run.steps` are committed or `stop` is called. Raises the first error of any part."""
        self._standing.keep_waits()
        try:
            await self._train()
            await self._surviving(lambda: self._saver.finish(self._state()))
        finally:
            await self._saver.abandon()

    async def _train(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                watching = [tasks.create_task(part.run()) for part in self._parts.watching]
                await self._standing.explained(self._replay)
                await self._standing.explained(self._begin)
                work = (self._read, self._feed, *[self._roll] * self._slots.capacity)
                producers = [*watching, *(tasks.create_task(self._standing.explained(part)) for part in work)]
                await self._standing.explained(self._consume)
                for producer in producers:
                    producer.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    # ---- producers

    async def _read(self) -> None:
        """Reads prompts ahead, one for each slot, so that freed slots are filled at once and their groups are rolled together."""
        cursor = self._next
        while True:
            try:
                prompt = await asyncio.to_thread(self._parts.stream.next)
            except DataError as error:
                await self._unread.put((cursor, cursor, error))  # raised when the prompt is needed, which it may never be
                return
            after = Cursor(cursor.seq + 1, self._parts.stream.state())
            await self._unread.put((cursor, after, prompt))
            cursor = after

    async def _feed(self) -> None:
        """Admits prompts in order, as slots become free. Groups that a resumed run already has are not rolled again."""
        while True:
            self._standing.feed("the next prompt of the data")
            cursor, after, prompt = await self._unread.get()
            self._standing.feed("a free slot" if self._wants_more() else "nothing: the groups of the last step are admitted")
            await self._slots.room(self._wants_more)
            if isinstance(prompt, DataError):
                raise prompt
            if cursor.seq not in self._restored.consumed:
                self._slots.take(cursor.seq)
                self._cursors[cursor.seq] = cursor
                self._ready.admit(cursor.seq)
                self._bias.admitted(cursor.seq)
                if cursor.seq in self._restored.finished:
                    await self._finished(self._journaled(cursor.seq, prompt))
                else:
                    self._parts.journal.append_admitted(AdmitRecord(cursor.seq, prompt.id, self._publisher.served_version))
                    self._admitted.put_nowait((cursor.seq, prompt))
            self._next = after

    def _journaled(self, seq: int, prompt: Prompt) -> Group:
        """A finished group of a resumed run. Raises `DataError` if the data has another prompt in its place now."""
        group = self._parts.journal.group(seq)
        if (group.prompt.id, group.prompt.messages) != (prompt.id, prompt.messages):
            raise DataError(
                f"the data has changed since the run began: group {seq} was rolled from {group.prompt.id}, now it is {prompt.id}"
            )
        return group

    def _wants_more(self) -> bool:
        """Whether the remaining steps need more groups than are admitted."""
        return len(self._cursors) < self._config.train.groups_per_step * (self._config.run.steps - self.version)

    async def _roll(self) -> None:
        """Rolls, scores and journals one group after another. There are as many of these as slots, so no group waits for another."""
        while True:
            seq, prompt = await self._admitted.get()
            encoded, group = await self._parts.replicas.roll(seq, prompt, self._algorithm.learns_from)
            self._standing.group(seq, f"the engines to have version {self._publisher.version}")
            await self._publisher.held_back()  # tokens of a version are held back until its probe has been compared
            self._parts.journal.append_group(seq, encoded)
            await self._finished(group)

    async def _finished(self, group: Group) -> None:
        self._bias.generated(group)
        self._standing.group(group.seq, "the filters")
        await self._intake.judge(group)
        self._standing.group(group.seq, "its turn")
        await self._ready.put(group)

    # ---- consumer

    async def _consume(self) -> None:
        """Takes groups and makes steps until the last one, or until asked to stop."""
        while self.version < self._config.run.steps:
            groups = await self._next_groups()
            if groups is None:
                break
            await self._step(groups)
        await self._surviving(self._publisher.served)

    async def _next_groups(self) -> list[Group] | None:
        """The next P trainable groups; None if asked to stop first. Groups that cannot be trained are dropped."""
        self._spans = Spans()
        with self._spans("rollout"):
            taking = asyncio.ensure_future(self._intake.take(self._config.train.groups_per_step, self.version + 1))
            stopping = asyncio.ensure_future(self._stop.wait())
            telling = asyncio.ensure_future(self._standing.tell_of_a_long_wait(self.version + 1, self._parts.observer.note))
            try:
                await self._serving_others({taking, stopping})
                return None if self._stop.is_set() else sorted(await taking, key=lambda group: group.seq)
            finally:
                for waiting in (taking, stopping, telling):
                    waiting.cancel()
                self._standing.waited(self._spans.elapsed_s)

    async def _serving_others(self, awaited: set[asyncio.Future[Any]]) -> None:
        """Returns when one of them is done. Meanwhile the trainers are idle: they give their weights to replicas that have none."""
        while True:
            lost, newcomers = (asyncio.ensure_future(w) for w in (self._publisher.lost(), self._publisher.newcomers()))
            try:
                done, _ = await asyncio.wait({*awaited, lost, newcomers}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                newcomers.cancel()
            if awaited & done:
                return
            await self._surviving(self._publisher.served)
            if newcomers in done:
                await self._surviving(self._publisher.bring_newcomers)

    async def _give_up(self, seq: int) -> None:
        """A group that is dropped: its slot goes to another prompt."""
        self._bias.dropped(seq)
        self._cursors.pop(seq)
        await self._free([seq])

    async def _step(self, groups: Sequence[Group], journaled: JournaledBatch | None = None) -> None:
        """One step: batch, updates, commit, and the pull that frees the slots. `journaled`: the step is trained again after a restart."""
        step, spans = self.version + 1, self._spans
        batch = batching.assemble(step, groups, self._config.algorithm)
        batching.require_fresh(batch, self.version, self._config.worst_staleness)
        dropped = self._intake.dropped(step)
        if journaled is None:
            for seq in batch.groups:
                self._standing.group(seq, f"the end of step {step}")
            await asyncio.to_thread(self._parts.journal.append_batch, BatchRecord(step, batch.groups, dropped.reasons, dropped.plan))
        async with self._parts.lease.training(spans, then=lambda: self._surviving(self._publisher.served)):
            trained = await self._surviving(lambda: self._compute(batch))
            with spans("commit"):
                await self._commit(step, trained.published.manifest.digest, journaled)
            for seq in batch.groups:
                self._cursors.pop(seq, None)
            await self._surviving(lambda: self._parts.snapshots.after_commit(step, trained.published.manifest.digest), "snapshot")
            await self._surviving(self._publisher.served, "pull_wait")
            self._publisher.begin(self._tasks, trained.published, [] if journaled else batch.groups)
            await self._surviving(lambda: self._saver.after_step(self._state()), "checkpoint")
        told = [*groups, *dropped.groups]
        metrics = batching.describe(told, trained.advantages, step - 1) | trained.tally.report() | self._parts.journal.report()
        metrics |= self._bias.trained(groups, step - 1)
        metrics |= dropped.metrics
        await self._after(told, metrics)

    async def _compute(self, batch: Batch, *, bringing_back: bool = False) -> Trained:
        """The updates of one step, up to the hash of its weights. Nothing outside the trainers changes: it may be done again.

        `bringing_back`: a version that did not arrive is not waited for, since its trainers are gone and it is published again behind this.
        """
        trained = await train_batch(
            self._parts.trainers,
            batch,
            self._config,
            self._spans,
            measured=lambda metrics: self._parts.observer.measured(batch.step, metrics),
            before_update=_at_once if bringing_back and self._publisher.unserved else self._weights_have_left,
        )
        with self._spans("publish"):
            return Trained(trained.advantages, trained.tally, await self._publish(batch.step))

    async def _weights_have_left(self) -> None:
        """Waits, where engines read the trainers' weights: an update must not come before those of the last version have left."""
        if self._parts.transfer.reads_trainers:
            with self._spans("pull_wait"):
                await self._publisher.served()

    async def _commit(self, step: int, digest: str, journaled: JournaledBatch | None) -> None:
        """Makes the step durable; or, when it was committed before, checks that the same weights came out."""
        if journaled is None or journaled.digest is None:
            await asyncio.to_thread(self._parts.journal.append_commit, CommitRecord(step, digest))
        else:
            self._require_same(step, digest, journaled.digest)
        self.version = step

    def _require_same(self, step: int, digest: str, committed: str) -> None:
        """A step that is trained again has the weights that were committed. Raises `InvariantViolation` where bits repeat."""
        if digest == committed:
            return
        message = f"step {step} was trained again from the journal and its weights hash is {digest}, not {committed} as committed"
        if self._config.run.deterministic and self._restored.same_sums:
            raise InvariantViolation(message + ": machine, library versions or thread count may differ from before")
        self._parts.observer.note(f"warning: {message}")

    async def _after(self, groups: Sequence[Group], metrics: dict[str, float]) -> None:
        """What follows a step: evaluation, hooks and report."""
        metrics |= {"slots/held": float(self._slots.held), "version": float(self.version)}
        metrics["replicas"] = float(len(self._parts.replicas.active))
        if due(self._config, self.version):
            await self._surviving(self._publisher.served, "pull_wait")
            with self._spans("evaluate"):
                metrics |= await self._parts.evaluate(self.version)
            await self._saver.measured(self.version, metrics)
        metrics |= await self._parts.hooks.after_step(self.version, metrics, self._spans)
        self._parts.observer.step(self.version, groups, metrics, self._spans)
        self._parts.hooks.check()

    # ---- weights

    async def _begin(self) -> None:
        """Gives the engines the restored weights before the first prompt is admitted. Makes an evaluation of them that is still owed:
        that before the first step, or one of a run that ended between the step's checkpoint and its row.
        """
        await self._surviving(self._publisher.served)
        self._spans = Spans()
        async with self._parts.lease.training(self._spans):
            published = await self._surviving(lambda: self._publish(self.version))
        self._publisher.begin(self._tasks, published, [])
        await self._surviving(self._publisher.served)
        if due(self._config, self.version):
            known = self._parts.observer.row(self.version)
            if known is None:
                known = await self._parts.evaluate(self.version)
                self._parts.observer.evaluation(self.version, known)
            await self._saver.measured(self.version, known)

    async def _publish(self, version: int) -> Published:
        """Hashes the trainer's weights, and writes them where the engines will need them."""
        needed = self._algorithm.learns_from == "policy" or bool(due(self._config, version)) or version == self._restored.step
        return await self._parts.trainers.publish(version, self._parts.transfer.location if needed else None, self._parts.probe_tokens)

    async def _free(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self._standing.freed(seq)
        await self._slots.free(seqs)

    # ---- what was lost

    async def _surviving(self, work: Callable[[], Awaitable[T]], phase: str | None = None) -> T:
        """Does what needs the trainers; once more, with those who were brought back, if ranks are lost in it. `phase`: of the step."""
        lost: TrainersLost | None = None
        while True:
            try:
                if lost is not None:
                    await self._bring_back(lost)
                with nullcontext() if phase is None else self._spans(phase):
                    return await work()
            except TrainersLost as again:
                lost = again

    async def _bring_back(self, lost: TrainersLost) -> None:
        """The trainers, to the last commit: from a snapshot or a checkpoint, and by the journaled steps since then."""
        async with self._parts.lease.reviving():
            with self._spans("recover"):
                restored = await self._revival.bring_back(lost, self.version)
            for step in range(restored + 1, self.version + 1):
                trained = await self._compute(self._journaled_batch(step), bringing_back=True)
                self._require_same(step, trained.published.manifest.digest, self._parts.journal.commit(step).digest)
            published = await self._publish(self.version) if self._publisher.unserved else None
        if published is not None:
            self._publisher.begin(self._tasks, published, [])

    def _journaled_batch(self, step: int) -> Batch:
        groups = journaled_groups(self._parts.journal, step, self._parts.trainers.routed_experts)
        return batching.assemble(step, groups, self._config.algorithm)

    async def _replay(self) -> None:
        """Trains again the journaled batches after the checkpoint; each must reach the weights that were committed."""
        for batch in self._restored.batches:
            if self._stop.is_set():
                return
            self._spans = Spans()
            groups = journaled_groups(self._parts.journal, batch.step, self._parts.trainers.routed_experts)
            for group in groups:
                self._bias.generated(group)
            await self._step(groups, journaled=batch)

    def _state(self) -> LoopState:
        """What a checkpoint must hold beside the trainer's state: where the feed has to go on."""
        return LoopState(self.version, self._cursors[min(self._cursors)] if self._cursors else self._next)


async def _at_once() -> None:
    """Nothing has to leave first."""


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first diagnosis in a tree of errors or, without one, the first error: a defect, or what a user's own source of prompts raised."""
    found, _ = errors.split(VerstError)
    error = (found or errors).exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
