"""A loop's parts without models, processes or Ray. They record what happened, in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np

from verst.config.schema import Config
from verst.errors import CheckpointError
from verst.journal.codec import encode_group
from verst.journal.log import Journal
from verst.observe.limits import FidelityWatch
from verst.observe.metrics import Tally
from verst.runtime.faults import Faults
from verst.runtime.filtering import Filters
from verst.runtime.hooks import Hooks
from verst.runtime.lease import Lease
from verst.runtime.pools import Replicas
from verst.runtime.replica import Replica
from verst.runtime.trainer_worker import Published, Scores
from verst.runtime.trainers import Trainers, TrainersLost
from verst.runtime.transfer import Brought
from verst.types import Estimates, FinishReason, Group, Manifest, Message, Prompt, RoutedExperts, Status, Trajectory, Turn

T = TypeVar("T")


def config(**sections: dict[str, Any]) -> Config:
    """Two groups a step of two trajectories each, three steps; sections are merged over that."""
    base: dict[str, dict[str, Any]] = {
        "run": {"steps": 3},
        "model": {"path": "unused"},
        "train": {"groups_per_step": 2},
        "rollout": {"group_size": 2, "deadline_s": 5.0},
        "weights": {"deadline_s": 5.0},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "checkpoint": {"every_steps": 100, "export_final": False},
    }
    return Config.model_validate({k: base.get(k, {}) | sections.get(k, {}) for k in base | sections})


def group(seq: int, version: int, rewards: Sequence[float | None] = (0.0, 1.0)) -> Group:
    """A group whose trajectories are two prompt tokens and one generated one; reward None makes it a failed one."""
    trajectories = tuple(
        Trajectory(
            id=f"{seq}/{m}",
            tokens_T=np.array([1, 2, 3], np.int32),
            loss_mask_T=np.array([False, False, True]),
            logprobs_T=np.array([0, 0, -1], np.float32),
            versions_T=np.array([-1, -1, version], np.int32),
            turns=(Turn(0, 2, 3, FinishReason.STOP, "c"),),
            messages=(Message("user", "q"), Message("assistant", "c")),
            status=Status.FINISHED if reward is not None else Status.FAILED,
            seed=seq * 100 + m,
            error=None if reward is not None else "the reward raised",
            reward=reward,
        )
        for m, reward in enumerate(rewards)
    )
    return Group(seq, Prompt(f"p{seq}", (Message("user", "q"),)), trajectories, version)


class FakeStream:
    """Prompts p0, p1, …; the state is how many were read."""

    def __init__(self) -> None:
        self.read = 0

    def state(self) -> dict[str, int]:
        return {"read": self.read}

    def restore(self, state: dict[str, int]) -> None:
        self.read = state["read"]

    def next(self) -> Prompt:
        self.read += 1
        return Prompt(f"p{self.read - 1}", (Message("user", "q"),))


class EndingStream(FakeStream):
    """Raises `error` in place of its fourth prompt."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def next(self) -> Prompt:
        if self.read == 3:
            raise self._error
        return super().next()


@dataclass
class FakeTrainers:
    """Weights are the list of groups trained so far, in order; the digest is that list. Anything lost, repeated or reordered shows."""

    events: list[str]
    num_updates: int = 1
    trained: list[int] = field(default_factory=list)
    saved: dict[int, list[int]] = field(default_factory=dict)
    disk_full: bool = False
    routed_experts: RoutedExperts | None = None
    k3: dict[int, float] = field(default_factory=dict)  # the mismatch of each step
    lose: list[str] = field(default_factory=list)  # moments, such as "load 2", at which a rank is lost, each once for each time it is named

    lost_at: str | None = None  # from then on, until they are rebuilt

    def _moment(self, moment: str) -> None:
        if moment in self.lose:
            self.lose.remove(moment)
            self.lost_at = moment
            self.trained = [-1]  # whatever is left of them must not be used
        if self.lost_at is not None:
            raise TrainersLost(f"trainer rank 1 died ({self.lost_at})")

    async def load_batch(self, batch: Any) -> Scores:
        self._moment(f"load {batch.step}")
        self._batch = batch
        return Scores(Tally(), {})

    async def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[Any] = ()) -> Tally:
        self._moment(f"forward {self._batch.step}")
        assert len(advantages) == len(self._batch.samples)
        tally = Tally()
        if update == 0 and self._batch.step in self.k3:
            tally.mean("mismatch/k3", self.k3[self._batch.step])
        return tally

    async def optimizer_step(self, update: int) -> Tally:
        if update == 0:
            self.trained.extend(self._batch.groups)
        self._moment(f"optimizer {self._batch.step}")
        self.events.append(f"optimizer {self._batch.step}.{update}")
        return Tally()

    async def publish(self, version: int, location: str | None, probe_T: Any) -> Published:
        self._moment(f"publish {version}")
        self.events.append(f"publish {version}")
        return Published(Manifest(version, location or "", (), " ".join(map(str, self.trained))), np.zeros(3, np.float32))

    async def release_memory(self, *, weights: bool) -> None:
        self.events.append(f"trainers release {'all' if weights else 'state'}")

    async def resume_memory(self) -> None:
        self.events.append("trainers resume")

    async def rebuild(self) -> list[str]:
        self.lost_at = None
        self._moment("rebuild")
        self.events.append("rebuild")
        self.trained = []
        return ["trainer rank 1"]

    async def snapshot(self, directories: Sequence[str], step: int) -> dict[str, Any]:
        self._moment(f"checkpoint {step}")
        self.events.append(f"snapshot {step}")
        self._saving = step
        return {}

    async def written(self, directories: Sequence[str]) -> list[Any]:
        await asyncio.sleep(0)
        self._moment(f"written {self._saving}")
        if self.disk_full:
            raise CheckpointError("no space left on the fake disk")
        self.saved[self._saving] = list(self.trained)
        return []

    async def restore(self, directory: str, step: int) -> None:
        self.trained = list(self.saved[step])

    async def export(self, directory: str) -> None:
        self._moment("export")
        self.events.append("export")


class FakeParts:
    """What a `Loop` works with. `roll` decides what a group becomes, and may wait, raise or count."""

    def __init__(
        self,
        config: Config,
        root: Path,
        roll: Callable[[int, int], Any] | None = None,
        seed: int = 0,
        shared: bool = False,
        delay_s: float = 0.003,
    ) -> None:
        """`delay_s`: the longest time that a group takes beside what `roll` waits for."""
        self.delay_s = delay_s
        self.config = config
        self.events: list[str] = []
        self.rolled: list[tuple[int, int]] = []  # (seq, version that the engines served)
        self.notes: list[str] = []
        self.rows: dict[int, dict[str, float]] = {}
        self._reported: dict[int, asyncio.Event] = {}
        self.stream = FakeStream()
        self.trainers = FakeTrainers(self.events, config.train.minibatches * config.train.epochs)
        journal = root / "journal"
        self.journal = Journal.open(journal) if journal.exists() else Journal.create(journal, "test-run")
        self.run = SimpleNamespace(root=root, checkpoints=root / "checkpoints", final=root / "final", lineage=None)
        self.replicas = self
        self.observer = self
        self.probe_tokens = np.array([1, 2, 3], np.int32)
        self.transfer = self
        self.snapshots = self
        self.watching: list[Any] = [SimpleNamespace(run=asyncio.Event().wait)]
        self.faults = Faults(self.journal, self.note)
        self.filters = Filters(config.filters, root)
        self.hooks = Hooks(config.hooks, root, self.note)
        self.kept: dict[int, list[int]] = {}  # snapshots: what was trained by then
        self.kept_every = 1
        self.location = "somewhere"
        self.reads_trainers = False
        self.lease = Lease(config, cast(Trainers, self.trainers), cast(Replicas, self), shared=shared)
        self.group_deadline_s = 5.0
        self.watch = FidelityWatch(config.fidelity.limit, config.fidelity.action)
        self.serving = -1
        self.active = [self]
        self.number = 0
        self.pull_s = 0.0
        self._roll = roll or group
        self._random = random.Random(seed)

    # replicas
    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        assert prompt.id == f"p{seq}", "the feed must read one prompt for each admission number"
        version = self.serving
        self.rolled.append((seq, version))
        await asyncio.sleep(self._random.random() * self.delay_s)
        result = self._roll(seq, version)
        finished = await result if asyncio.iscoroutine(result) else result
        return encode_group(finished), finished

    async def standing(self) -> dict[int, tuple[str, float]]:
        return {}

    async def release_memory(self) -> None:
        self.events.append("engines release")

    async def resume_memory(self) -> None:
        self.events.append("engines resume")

    async def evaluate(self, step: int) -> dict[str, float]:
        assert step == self.serving
        self.events.append(f"evaluate {self.serving}")
        return {"eval/reward": 0.5}

    async def bring(self, published: Published, probe_T: Any) -> Brought:
        version = published.manifest.version
        self.trainers._moment(f"send {version}")
        self.events.append(f"pull {version}")
        await asyncio.sleep(self.pull_s)
        self.serving = version
        self.events.append(f"serve {version}")
        await self.verdict(version)
        return Brought(0.0, {})

    async def bring_newcomers(self, published: Published, probe_T: Any) -> None:
        raise AssertionError("there are no newcomers")

    async def newcomers(self) -> None:
        await asyncio.Event().wait()

    async def reopen(self) -> None:
        self.events.append("reopen")

    # snapshots
    async def after_commit(self, step: int, digest: str) -> None:
        self.trainers._moment(f"snapshot {step}")
        if step % self.kept_every == 0:
            self.kept[step] = list(self.trainers.trained)

    async def restore(self, at_most: int, newer_than: int = -1) -> int | None:
        steps = [step for step in self.kept if step <= at_most]
        if not steps:
            return None
        self.trainers.trained = list(self.kept[max(steps)])
        return max(steps)

    async def verdict(self, version: int) -> None:
        """What the probe finds once a version serves."""

    async def keep_stacks(self, reason: str) -> list[str]:
        return []

    # observer
    def note(self, line: str) -> None:
        self.notes.append(line)

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        for line in self.watch.check(step, metrics):
            self.note(line)

    def step(self, step: int, groups: Sequence[Group], metrics: dict[str, float], spans: Any) -> None:
        self.events.append(f"report {step}")
        self.rows[step] = dict(metrics)
        self._reported.setdefault(step, asyncio.Event()).set()

    async def reported(self, step: int) -> None:
        """Waits until a step was reported."""
        await asyncio.wait_for(self._reported.setdefault(step, asyncio.Event()).wait(), 10)

    def generated(self, group: Group) -> None: ...

    def published(self, version: int, brought: Brought) -> None: ...

    def checkpoint_written(self, step: int) -> None: ...

    def checkpoint_failed(self, step: int, error: CheckpointError) -> None:
        self.note(f"checkpoint of step {step}: {error}")

    def row(self, step: int) -> dict[str, float] | None:
        return self.rows.get(step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.rows[step] = dict(metrics)


class NothingLost:
    """While a run starts."""

    async def replica(self, first: Replica, work: Callable[[Replica], Awaitable[T]]) -> T:
        return await work(first)
