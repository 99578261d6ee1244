"""Everything the loop works with, behind names that do not say where it runs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.data.stream import PromptStream
from verst.journal.log import Journal
from verst.observe.metrics import Tally
from verst.runtime.faults import Faults
from verst.runtime.filtering import Filters
from verst.runtime.heartbeat import Heartbeat
from verst.runtime.hooks import Hooks
from verst.runtime.lease import Lease
from verst.runtime.observer import Observer
from verst.runtime.pools import Replicas
from verst.runtime.replacer import Replacer
from verst.runtime.rundir import RunDirectory
from verst.runtime.salvage import Salvage
from verst.runtime.snapshots import Snapshots
from verst.runtime.stacks import KeepStacks
from verst.runtime.trainers import Trainers
from verst.runtime.transfer import Transfer
from verst.types import Prompt, Status


@dataclass
class Parts:
    """What a run is made of."""

    config: Config
    run: RunDirectory
    stream: PromptStream
    journal: Journal
    trainers: Trainers
    replicas: Replicas
    observer: Observer
    probe_tokens: NDArray[np.int32]
    transfer: Transfer
    lease: Lease
    snapshots: Snapshots
    replacer: Replacer
    heartbeat: Heartbeat
    faults: Faults
    filters: Filters
    hooks: Hooks
    eval_prompts: list[Prompt]
    keep_stacks: KeepStacks

    @property
    def watching(self) -> tuple[Replacer, Heartbeat, Salvage]:
        """What runs beside the loop from its beginning to its end."""
        return self.replacer, self.heartbeat, self.replicas.salvage

    @property
    def group_deadline_s(self) -> float:
        """Limit of the wait for the next group. The replica's own limit expires first and names it."""
        return self.replicas.step_wait_s

    async def evaluate(self) -> dict[str, float]:
        """Mean reward over the held-out prompts that could be scored, one trajectory each, and the share that failed."""
        groups = await asyncio.gather(*(self.replicas.roll(-1 - i, p, "evaluation") for i, p in enumerate(self.eval_prompts)))
        tally = Tally()
        for trajectory in (t for _, g in groups for t in g.trajectories):
            if trajectory.reward is not None:
                tally.mean("eval/reward", trajectory.reward)
            tally.mean("eval/failed", float(trajectory.status is Status.FAILED))
            tally.mean("eval/generated_tokens", trajectory.generated_tokens)
        return tally.report()
