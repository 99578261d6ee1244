"""One run as an object: builds its parts, recovers, runs the loop, and answers those who watch.

Lives in an actor of its own (`verst.runtime.launch`), so that the command line can come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verst.config.checks import scores
from verst.data.sources import open_source
from verst.data.stream import PromptStream
from verst.errors import ConfigError, VerstError
from verst.extend import origin
from verst.journal.lock import RunLock
from verst.journal.log import Journal
from verst.rollout.recorded import Piece
from verst.runtime.actors import Worker
from verst.runtime.adoption import adopt_replicas, complete, keep_finished, still_in_flight
from verst.runtime.bundles import reserve
from verst.runtime.changes import journal_changes
from verst.runtime.eval_sets import EvalSets
from verst.runtime.extensions import Extensions
from verst.runtime.faults import Faults
from verst.runtime.filtering import Filters
from verst.runtime.heartbeat import Heartbeat
from verst.runtime.hooks import Hooks
from verst.runtime.kept import Kept
from verst.runtime.lease import Lease
from verst.runtime.loop import Loop
from verst.runtime.observer import Observer, fidelity_watch
from verst.runtime.parts import Parts
from verst.runtime.placement import Placement, place, reward_gpus
from verst.runtime.pools import Replicas
from verst.runtime.recovery import Restored, recover
from verst.runtime.replacer import Replacer
from verst.runtime.replica import Replica
from verst.runtime.revival import Losses
from verst.runtime.rollout_worker import replica_worker
from verst.runtime.rundir import RunDirectory
from verst.runtime.scaler import Means, Scaler
from verst.runtime.snapshots import Snapshots
from verst.runtime.stacks import KeepStacks
from verst.runtime.starting import Starting
from verst.runtime.trainer_worker import rank_worker
from verst.runtime.trainers import Trainers
from verst.runtime.transfer import Transfer
from verst.secrets import require
from verst.training.snapshots import SnapshotHolder, snapshot_directory
from verst.types import Prompt
from verst.weights.location import held, publish_directory

Spawn = Callable[..., Worker]


class RunService:
    """Everything of one run that is not a model: lock, parts, loop."""

    def __init__(self, root: str, spawn_worker: Spawn | None = None, placement: Placement | None = None) -> None:
        """`spawn_worker` starts the processes of the run, which end with this one. Default: they outlive it (`verst.runtime.kept`)."""
        self._run, self._config = RunDirectory.open(root)
        self._given_spawn = spawn_worker
        self._spawn: Spawn
        self._whole: asyncio.Task[None] | None = None
        self._placement = placement
        self._kept: Kept | None = None
        self._spawn_replica: Callable[[int, int], Worker]
        self._observer = Observer(self._run, self._config.run.steps, fidelity_watch(self._config))
        self._weights_location = publish_directory(self._run.run_id, self._config.weights.location)
        self._stop = False
        self._loop: Loop | None = None

    async def run(self) -> None:
        """Trains to the end, or to the next consistent point after `stop`. Everyone who calls it waits for the same end."""
        await self.begin()
        assert self._whole is not None
        await asyncio.shield(self._whole)

    async def begin(self) -> None:
        """Begins the run, unless somebody else has; it goes on by itself from here."""
        if self._whole is None:
            self._whole = asyncio.create_task(self._to_the_end())

    async def _to_the_end(self) -> None:
        with RunLock(self._run.root):
            self._run.scale_request.unlink(missing_ok=True)  # not got to before: a start has its own number
            try:
                await self._train()
            except Exception as error:
                diagnosis = f"{type(error).__name__}: {error}" if isinstance(error, VerstError) else origin(error)
                self._observer.record(f"ended by {diagnosis}")
                raise

    async def _train(self) -> None:
        async with contextlib.AsyncExitStack() as opened:
            parts, starting = await self._build(opened)
            restored = await starting.surviving(partial(self._recovered, parts))
            journal_changes(self._run, parts.journal)  # the first record since it was opened: recovery has found that its end is no damage
            parts.faults.write_held()
            self._observer.checkpoint_written(restored.saved)
            self._loop = Loop(self._config, parts, restored)
            if self._stop:
                self._loop.stop()
            async with self._scaler(parts, self._loop).following():
                await self._loop.run()
            await asyncio.to_thread(self._observer.finish)

    async def _recovered(self, parts: Parts) -> Restored:
        """What needs all trainer ranks before the first step; it may be done again."""
        await parts.transfer.open(self._run.run_id)
        await parts.snapshots.start()
        if self._kept is not None:
            self._kept.end_rest()
        return await recover(parts)

    def _scaler(self, parts: Parts, loop: Loop) -> Scaler:
        changed = partial(journal_changes, self._run, parts.journal)
        means = Means(self._spawn_replica, self._check_replicas, self._observer.note, lambda: loop.version, changed)
        return Scaler(self._run, self._config, parts.replicas, means)

    def _check_replicas(self, number: int) -> None:
        """Raises `ConfigError` if the run cannot have so many replicas while it lives."""
        config, placement = self._config, self._placement
        assert placement is not None, "parts are built first"
        if config.rollout.urls:
            raise ConfigError("rollout.urls names the server of each replica, and has none for others")
        if placement.shared:
            raise ConfigError(
                "replicas and trainer ranks take turns on the same devices, which are divided among them as the run begins; "
                f"stop it, then: verst resume {self._run.root} rollout.replicas={number}"
            )
        gpus, needed = _cluster_gpus() - reward_gpus(config), config.train.ranks + number * int(placement.replica_gpus)
        if placement.replica_gpus and needed > gpus:
            raise ConfigError(
                f"{config.train.ranks} trainer rank(s) and {number} replica(s) need {needed} GPUs, the cluster has {gpus} for them"
            )

    async def lines(self, after: int, wait_s: float) -> tuple[int, list[str]]:
        """Lines for the watcher, beyond the first `after` of them, and the number of the last."""
        return await self._observer.lines(after, wait_s)

    async def tell_standing(self) -> None:
        """Tells who waits for whom now."""
        lines = ["starting, or restoring: nothing is rolled or trained yet"] if self._loop is None else await self._loop.standing()
        for line in lines:
            self._observer.note(line)

    async def stop(self) -> None:
        """Ends the run at the next consistent point."""
        self._stop = True
        if self._loop is not None:
            self._loop.stop()

    async def _build(self, opened: contextlib.AsyncExitStack) -> tuple[Parts, Starting]:
        """Starts every process of the run at the same time, and opens what the loop itself reads and writes.

        With what sees to the trainers until the loop does.
        """
        config, extensions = self._config, self._extensions()
        opened.callback(self._observer.close)
        self._observer.open_outlets(config)
        opened.push_async_callback(self._observer.close_outlets)
        opened.enter_context(held(self._weights_location))
        journal = await asyncio.to_thread(Journal.open, self._run.journal, self._run.run_id)  # reads all of it
        opened.callback(journal.close)
        faults = Faults(journal, self._observer.note)
        faults.hold()
        self._placement = placement = self._placement or place(config, _cluster_gpus())
        on = await reserve(placement, config.train.ranks, opened, config.train.deadline_s)
        put = ray.put if ray.is_initialized() else _same
        kept = self._kept = self._processes(placement)
        self._spawn_replica = partial(self._replica, placement, on, extensions.of_replicas())
        again = kept is not None and bool(kept.left("trainer rank"))
        adopted, in_flight = await self._adopted(kept, journal)
        members = complete(adopted, config.rollout.replicas, self._spawn_replica)
        trainers = Trainers(partial(self._trainer, placement, on), config, put, self._observer.note)
        replicas = Replicas(members, config, shared=placement.shared, timeline=self._observer.timeline)
        replicas.salvage.add(in_flight)
        snapshots = Snapshots(config, self._run.run_id, trainers, self._snapshot_holder, self._observer.note)
        opened.push_async_callback(snapshots.close)
        for part in (trainers, replicas):
            opened.push_async_callback(self._close, part)
        filters, hooks = await self._users(opened)
        stream, eval_sets = await self._prompts(extensions)
        scored = bool(eval_sets) or scores(config, reward_given=extensions.reward is not None)
        lease = Lease(config, trainers, replicas, shared=placement.shared)
        keep = KeepStacks(lambda: [*trainers.workers, *replicas.workers], self._run.logs)
        losses = Losses(faults, keep, self._run.root)
        starting = Starting(trainers, replicas, self._spawn_replica, losses, faults, journal.index.last_commit)
        await lease.start(scored, starting, again=again)
        replicas.require_routes(trainers.routed_experts)
        parts = Parts(
            config=config,
            run=self._run,
            stream=stream,
            journal=journal,
            trainers=trainers,
            replicas=replicas,
            observer=self._observer,
            probe_tokens=await replicas.probe_tokens(await asyncio.to_thread(_first, stream), starting),
            transfer=Transfer(config, placement, trainers, replicas, str(self._weights_location)),
            lease=lease,
            snapshots=snapshots,
            replacer=Replacer(replicas, self._spawn_replica, faults, keep),
            heartbeat=Heartbeat(lambda: [*trainers.workers, *replicas.workers, *snapshots.workers], self._observer.note),
            faults=faults,
            filters=filters,
            hooks=hooks,
            eval_sets=eval_sets,
            keep_stacks=keep,
        )
        return parts, starting

    async def _users(self, opened: contextlib.AsyncExitStack) -> tuple[Filters, Hooks]:
        """The user's code that the loop calls, each in a process of its own. Raises `ExtensionError` if one of them cannot be loaded."""
        secrets = self._config.run.secrets
        require(secrets)
        filters = Filters(self._config.filters, self._run.logs, secrets)
        hooks = Hooks(self._config.hooks, self._run.logs, self._observer.note, secrets)
        for part in (filters, hooks):
            opened.callback(part.close)
            await part.start()
        return filters, hooks

    async def _prompts(self, extensions: Extensions) -> tuple[PromptStream, EvalSets]:
        """Those to train on, and those to evaluate."""
        data = self._config.data
        source = open_source(data, extensions.rows)
        stream = PromptStream(source, data, seed=self._config.run.seed, split="train")
        stream.restore(self._run.stream)  # refuses other data than the run began with
        return stream, await asyncio.to_thread(EvalSets.of, self._config, source)

    async def _adopted(self, kept: Kept | None, journal: Journal) -> tuple[list[Replica], dict[int, list[Piece]]]:
        """Replicas that an earlier loop has left, and what they had in flight. What they had finished goes into the journal."""
        if kept is None:
            return [], {}
        ranks, left = len(kept.left("trainer rank")), kept.take("replica")
        replicas, had = await adopt_replicas(left, self._config.rollout.replicas)
        in_flight = still_in_flight(journal, had)
        if ranks or left:
            saved = keep_finished(journal, had)
            self._observer.note(
                f"the loop starts again with processes that live: {ranks} trainer rank(s), {len(replicas)} replica(s); {saved} group(s)"
                " that were finished are kept"
            )
        return replicas, in_flight

    async def _close(self, part: Trainers | Replicas) -> None:
        """Ends a part in order. One that cannot be closed any more (it may be why the run ends) is told, not raised."""
        try:
            await part.close()
        except VerstError as error:
            self._observer.note(f"while closing: {error}")

    def _extensions(self) -> Extensions:
        path = self._run.extensions
        return Extensions.unpack(path.read_bytes() if path.exists() else None)

    def _processes(self, placement: Placement) -> Kept | None:
        """What an earlier loop of this run has left. Says how processes are started from here on."""
        if self._given_spawn is not None:
            self._spawn = self._given_spawn
            return None
        kept = Kept(self._run.run_id, self._config)
        self._spawn = kept.spawn
        if placement.shared:
            kept.end_rest()
        return kept

    def _trainer(self, placement: Placement, on: Sequence[dict[str, Any]], rank: int) -> Worker:
        name = f"trainer rank {rank}"
        return self._spawn(name, rank_worker, self._config, rank, placement.device, gpus=placement.trainer_gpus, **on[rank])

    def _snapshot_holder(self, rank: int, node: str) -> Worker:
        on = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} if node else {}
        return self._spawn(f"snapshot holder {rank}", SnapshotHolder, str(snapshot_directory(self._run.run_id, rank)), **on)

    def _replica(self, placement: Placement, on: Sequence[dict[str, Any]], extensions: bytes | None, number: int, slot: int) -> Worker:
        return self._spawn(
            f"replica {number}",
            replica_worker,
            self._config,
            extensions,
            number,
            placement.device,
            self._run.logs,
            placement.shared,
            1,
            slot,
            placement.teacher_device,
            gpus=placement.replica_gpus,
            **on[slot % len(on)],
        )


def _cluster_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0


def _same(value: Any) -> Any:
    return value


def _first(stream: PromptStream) -> Prompt:
    """The prompt that comes next, without taking it."""
    state = stream.state()
    prompt = stream.next()
    stream.restore(state)
    return prompt
