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
from verst.runtime.observer import Observer
from verst.runtime.pools import Replicas, Scoring, Trainers
from verst.runtime.rundir import RunDirectory
from verst.types import Group, Prompt, Status


@dataclass
class Parts:
    """What a run is made of."""

    config: Config
    run: RunDirectory
    stream: PromptStream
    journal: Journal
    trainers: Trainers
    replicas: Replicas
    scoring: Scoring
    observer: Observer
    probe_tokens: NDArray[np.int32]
    weights_location: str
    eval_prompts: list[Prompt]

    @property
    def group_deadline_s(self) -> float:
        """Limit of the wait for the next group. The limits of rolling and scoring expire first and name the replica or scorer."""
        return self.config.capacity_groups * (self.config.rollout.deadline_s + self.scoring.deadline_s) + self.config.weights.deadline_s

    async def rollout(self, seq: int, prompt: Prompt, how: str) -> Group:
        """One finished group: rolled and, unless it is a demonstration, scored."""
        encoded, group = await self.replicas.roll(seq, prompt, how)
        if how == "demonstrations":
            return group
        return await self.scoring.score(encoded, group)

    async def evaluate(self) -> dict[str, float]:
        """Mean reward over the held-out prompts that could be scored, one trajectory each, and the share that failed."""
        groups = await asyncio.gather(*(self.rollout(-1 - i, p, "evaluation") for i, p in enumerate(self.eval_prompts)))
        tally = Tally()
        for trajectory in (t for g in groups for t in g.trajectories):
            if trajectory.reward is not None:
                tally.mean("eval/reward", trajectory.reward)
            tally.mean("eval/failed", float(trajectory.status is Status.FAILED))
            tally.mean("eval/generated_tokens", trajectory.generated_tokens)
        return tally.report()
