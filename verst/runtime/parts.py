"""Everything the loop works with, behind names that do not say where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.data.stream import PromptStream
from verst.journal.log import Journal
from verst.runtime.eval_sets import EvalSets
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
    eval_sets: EvalSets
    keep_stacks: KeepStacks

    @property
    def watching(self) -> tuple[Replacer, Heartbeat, Salvage]:
        """What runs beside the loop from its beginning to its end."""
        return self.replacer, self.heartbeat, self.replicas.salvage

    @property
    def group_deadline_s(self) -> float:
        """Limit of the wait for the next group. The replica's own limit expires first and names it."""
        return self.replicas.step_wait_s

    async def evaluate(self, step: int) -> dict[str, float]:
        """The metrics of all sets that are due with the weights of `step`, which the engines serve."""
        return await self.eval_sets.measure(step, self.replicas.roll)
