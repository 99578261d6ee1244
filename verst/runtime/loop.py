"""The loop: producers and one consumer around a bounded set of group slots.

    who        takes               gives                 waits for                        unblocked by
    read       the data            prompts               room for one                     feed
    feed       a prompt, a slot    admitted prompts      a free slot                      pull
    roll x C   an admitted prompt  a scored, journaled   a prompt; engine and scorer      feed
                                   group
    consumer   the next P groups   a committed step      its groups, by the window        roll
    pull       a committed version freed slots           every engine's verified pull     consumer

C is the capacity, P the groups of a step. Synchronous training is C = P: nothing is admitted until the engines hold the step's weights. A
larger C lets rollout run ahead. There are no modes: the same lines run either way. Where trainer and engines share devices, a step up to
its checkpoint is the trainers' turn on them, and the pull waits for its end (`verst.runtime.lease`).

The commit precedes the pull, so engines never serve a version that a crash could take back. A producer that ends is an error. A failed
trajectory is data; a broken invariant stops the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from verst.algorithms.table import algorithm_for
from verst.config.schema import Config
from verst.errors import DataError, InvariantViolation, VerstError
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, PublishRecord
from verst.observe.metrics import Tally
from verst.observe.spans import Spans
from verst.runtime import batching
from verst.runtime.bias import Bias
from verst.runtime.limits import pull_limit_s
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, JournaledBatch, LoopState, Restored
from verst.runtime.saving import Saver
from verst.runtime.slots import GroupSlots, Ready
from verst.runtime.standing import Standing
from verst.runtime.trainer_worker import Published
from verst.runtime.wait import within
from verst.types import Group, Prompt

_REPLACED_BATCHES = 20
"""Batches' worth of groups without signal that end a run before one whole batch was found."""


class Loop:
    """One run. Everything it works with is in `parts`; everything it knows after a crash comes from `restored`."""

    def __init__(self, config: Config, parts: Parts, restored: Restored) -> None:
        self._config = config
        self._parts = parts
        self._restored = restored
        self._algorithm = algorithm_for(config.algorithm)
        self._slots = GroupSlots(config.capacity_groups)
        self._admitted: asyncio.Queue[tuple[int, Prompt]] = asyncio.Queue()
        self._ready = Ready(config.rollout.window_groups)
        self._cursors: dict[int, Cursor] = {}  # where to feed from again, for each admitted group that no batch has consumed
        self._next = restored.cursor  # of the next prompt to admit
        self._unread: asyncio.Queue[tuple[Cursor, Cursor, Prompt | DataError]] = asyncio.Queue(config.capacity_groups)
        self._dropped: dict[int, tuple[Group, str]] = {}  # since the last batch, each with the reason
        self._drops_in_a_row = 0
        self._signalless = 0  # groups dropped for their equal rewards since the last batch
        self._bias = Bias()
        self._pulling: asyncio.Task[None] | None = None
        self._pulled_version = restored.step  # of the newest pull, in progress or done
        self._served_version = restored.step  # of the newest pull that is done
        self._stop = asyncio.Event()
        self._standing = Standing(self._slots, parts.replicas)
        self._saver = Saver(config, parts, saved=restored.step)
        self.version = restored.step

    def stop(self) -> None:
        """Asks the loop to end at the next consistent point: after the step in progress, or at once while it waits for groups."""
        self._stop.set()

    async def standing(self) -> list[str]:
        """Who waits for whom now, in a few lines."""
        return await self._standing.lines()

    async def run(self) -> None:
        """Trains until `run.steps` are committed or `stop` is called. Raises the first error of any part."""
        self._standing.keep_waits()
        try:
            await self._train()
            await self._saver.finish(self._state())
        finally:
            await self._saver.abandon()

    async def _train(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await self._standing.explained(self._replay)
                await self._standing.explained(self._begin)
                work = (self._read, self._feed, *[self._roll] * self._slots.capacity)
                producers = [tasks.create_task(self._standing.explained(part)) for part in work]
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
                    self._parts.journal.append_admitted(AdmitRecord(cursor.seq, prompt.id, self._served_version))
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
            self._standing.group(seq, f"the engines to have version {self._pulled_version}")
            await self._pulled()  # tokens of a version are held back until its probe has been compared
            self._parts.journal.append_group(seq, encoded)
            await self._finished(group)

    async def _finished(self, group: Group) -> None:
        self._bias.generated(group)
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
        await self._pulled()

    async def _next_groups(self) -> list[Group] | None:
        """The next P trainable groups; None if asked to stop first. Groups that cannot be trained are dropped."""
        self._spans = Spans()
        with self._spans("rollout"):
            taking = asyncio.ensure_future(self._take(self._config.train.groups_per_step))
            stopping = asyncio.ensure_future(self._stop.wait())
            telling = asyncio.ensure_future(self._standing.tell_of_a_long_wait(self.version + 1, self._parts.observer.note))
            try:
                await asyncio.wait({taking, stopping}, return_when=asyncio.FIRST_COMPLETED)
                return None if self._stop.is_set() else sorted(await taking, key=lambda group: group.seq)
            finally:
                for waiting in (taking, stopping, telling):
                    waiting.cancel()
                self._standing.waited(self._spans.elapsed_s)

    async def _take(self, count: int) -> list[Group]:
        groups: list[Group] = []
        while len(groups) < count:
            limit = self._parts.group_deadline_s
            group = await within(self._ready.pop(), limit, f"the next of {count} groups ({len(groups)} are ready)")
            group = batching.refused(group, self._parts.trainers.routed_experts)
            reason = batching.unusable(group, self._algorithm.min_members)
            if reason is not None:
                await self._drop(group, reason)
            elif self._algorithm.needs_signal(self._config.algorithm) and batching.without_signal(group):
                await self._replace(group)
            else:
                groups.append(group)
                self._standing.group(group.seq, "the rest of its batch")
                self._drops_in_a_row = 0
        return groups

    async def _replace(self, group: Group) -> None:
        """Drops a group that has no gradient. That is a measure of the task, not a failure, but it must not go on for ever."""
        self._signalless += 1
        reward = group.trainable[0].reward
        if self._signalless > _REPLACED_BATCHES * self._config.train.groups_per_step:
            raise DataError(
                f"step {self.version + 1}: {self._signalless} groups were dropped because all their rewards were equal (the last: {reward})"
                " before a batch was whole: the task is too easy or too hard for the model. Change the data, or algorithm.dynamic_sampling"
            )
        await self._give_up(group, f"all its rewards are equal ({reward})")

    async def _drop(self, group: Group, reason: str) -> None:
        """Gives up a group that cannot be trained, and tells of it. Too many in a row end the run."""
        if group.seq not in self._restored.finished:  # else it failed before the restart, and what made it fail may be mended
            self._drops_in_a_row += 1
        self._parts.observer.note(f"group {group.seq} ({group.prompt.id}) dropped: {reason}")
        if self._drops_in_a_row > 2 * self._slots.capacity:
            raise DataError(
                f"{self._drops_in_a_row} groups in a row could not be trained; the last one (group {group.seq}, prompt {group.prompt.id}): "
                f"{reason}. Mend what made them fail, then go on with: verst resume {self._parts.run.root}"
            )
        await self._give_up(group, reason)

    async def _give_up(self, group: Group, reason: str) -> None:
        """Recorded with the next batch, and its slot goes to another prompt."""
        self._dropped[group.seq] = (group, reason)
        self._bias.dropped(group.seq)
        self._cursors.pop(group.seq)
        await self._free([group.seq])

    async def _step(self, groups: Sequence[Group], journaled: JournaledBatch | None = None) -> None:
        """One step: batch, updates, commit, and the pull that frees the slots. `journaled`: the step is trained again after a restart."""
        step, spans, trainers = self.version + 1, self._spans, self._parts.trainers
        batch = batching.assemble(step, groups)
        batching.require_fresh(batch, self.version, self._config.worst_staleness)
        if journaled is None:
            for seq in batch.groups:
                self._standing.group(seq, f"the end of step {step}")
            reasons = {seq: reason for seq, (_, reason) in self._dropped.items()}
            await asyncio.to_thread(self._parts.journal.append_batch, BatchRecord(step, batch.groups, reasons))
        dropped, self._dropped = [group for group, _ in self._dropped.values()], {}
        async with self._parts.lease.training(spans, then=self._pulled):
            with spans("load"):
                scores = await trainers.load_batch(batch)
            advantages = batching.advantages(batch, self._config.algorithm, scores.reference_kl)
            tally = Tally().merge(scores.tally)
            for update in range(trainers.num_updates):
                with spans("forward_backward"):
                    tally.merge(await trainers.forward_backward(update, advantages))
                self._parts.observer.measured(step, tally.report())
                if self._parts.transfer.reads_trainers:
                    with spans("pull_wait"):
                        await self._pulled()  # else an update could come before its weights have left
                with spans("optimizer"):
                    tally.merge(await trainers.optimizer_step(update))
            with spans("publish"):
                published = await self._publish(step)
            with spans("commit"):
                await self._commit(step, published.manifest.digest, journaled)
            for seq in batch.groups:
                self._cursors.pop(seq, None)
            with spans("pull_wait"):
                await self._pulled()
            held = [] if journaled else batch.groups
            self._pulled_version = step
            self._pulling = self._tasks.create_task(self._standing.explained(lambda: self._pull(published, held)))
            with spans("checkpoint"):
                await self._saver.after_step(self._state())
        replaced, self._signalless = self._signalless, 0
        metrics = batching.describe([*groups, *dropped], advantages, step - 1) | tally.report()
        metrics |= self._bias.trained(groups, step - 1) | self._parts.journal.report()
        metrics |= {"groups/dropped": float(len(dropped) - replaced), "groups/replaced": float(replaced)}
        await self._after([*groups, *dropped], metrics)

    async def _commit(self, step: int, digest: str, journaled: JournaledBatch | None) -> None:
        """Makes the step durable; or, when it was committed before, checks that the same weights came out."""
        if journaled is None or journaled.digest is None:
            await asyncio.to_thread(self._parts.journal.append_commit, CommitRecord(step, digest))
        elif journaled.digest != digest:
            message = (
                f"step {step} was trained again from the journal and its weights hash is {digest}, not {journaled.digest} as committed"
            )
            if self._config.run.deterministic and self._restored.same_sums:
                raise InvariantViolation(message + ": machine, library versions or thread count may differ from before")
            self._parts.observer.note(f"warning: {message}")
        self.version = step

    async def _after(self, groups: Sequence[Group], metrics: dict[str, float]) -> None:
        """What follows a step: evaluation and report."""
        metrics |= {"slots/held": float(self._slots.held), "version": float(self.version)}
        metrics["replicas"] = float(len(self._parts.replicas.active))
        if self._evaluates_at(self.version):
            with self._spans("pull_wait"):
                await self._pulled()
            with self._spans("evaluate"):
                metrics |= await self._parts.evaluate()
        self._parts.observer.step(self.version, groups, metrics, self._spans)

    # ---- weights

    async def _begin(self) -> None:
        """Gives the engines the restored weights before the first prompt is admitted."""
        await self._pulled()
        self._spans = Spans()
        async with self._parts.lease.training(self._spans):
            published = await self._publish(self.version)
        await self._pull(published, [])
        if self._config.eval.every_steps and self.version == 0:
            self._parts.observer.evaluation(0, await self._parts.evaluate())

    async def _publish(self, version: int) -> Published:
        """Hashes the trainer's weights, and writes them where the engines will need them."""
        needed = self._algorithm.learns_from == "policy" or self._evaluates_at(version) or version == self._restored.step
        return await self._parts.trainers.publish(version, self._parts.transfer.location if needed else None, self._parts.probe_tokens)

    async def _pull(self, published: Published, seqs: Sequence[int]) -> None:
        """All engines load, verify and serve a version; only then are the slots free whose gradient it includes."""
        for seq in seqs:
            self._standing.group(seq, f"the engines to have version {published.manifest.version}")
        if published.manifest.location:
            async with self._parts.lease.transfer(reads_trainers=self._parts.transfer.reads_trainers):
                brought = await self._parts.transfer.bring(published, self._parts.probe_tokens)
            serving = tuple(replica.number for replica in self._parts.replicas.active)
            manifest = published.manifest
            self._parts.journal.append_published(PublishRecord(manifest.version, manifest.digest, serving))
            self._served_version = manifest.version
            self._parts.observer.published(manifest.version, brought)
        await self._free(seqs)

    async def _free(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self._standing.freed(seq)
        await self._slots.free(seqs)

    async def _pulled(self) -> None:
        """Waits for the pull in progress, if there is one: until its version serves, and its probe was compared."""
        pulling = self._pulling
        if pulling is None:
            return
        limit_s = pull_limit_s(self._config) + self._parts.lease.hand_over_s
        await within(asyncio.shield(pulling), limit_s, f"engines to pull version {self._pulled_version}")
        if self._pulling is pulling:  # several wait for it, and the next one may have begun
            self._pulling = None

    def _evaluates_at(self, version: int) -> bool:
        every = self._config.eval.every_steps
        return bool(every) and (version % every == 0 or version == self._config.run.steps)

    # ---- resume

    async def _replay(self) -> None:
        """Trains again the journaled batches after the checkpoint; each must reach the weights that were committed."""
        for batch in self._restored.batches:
            if self._stop.is_set():
                return
            self._spans = Spans()
            needed = self._parts.trainers.routed_experts
            groups = [batching.refused(self._parts.journal.group(seq), needed) for seq in batch.groups]
            for group in groups:
                self._bias.generated(group)
            await self._step(groups, journaled=batch)

    def _state(self) -> LoopState:
        """What a checkpoint must hold beside the trainer's state: where the feed has to go on."""
        return LoopState(self.version, self._cursors[min(self._cursors)] if self._cursors else self._next)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first diagnosis in a tree of errors or, without one, the first error: a defect, or what a user's own source of prompts raised."""
    found, _ = errors.split(VerstError)
    error = (found or errors).exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
