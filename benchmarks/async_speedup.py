"""How close rollout and training come to not waiting for each other: the real loop around a simulated engine and trainer.

    python benchmarks/async_speedup.py [--steps 100] [--train-s 0.4] [--places 64] [--sigma 1.0]

The engine decodes `--places` trajectories at once, each for a time of its own, log-normal with `--sigma` (heavy-tailed, as answers are);
the trainer takes `--train-s` for a step. By default both need the same time for a batch, so that a perfect overlap halves the step. Loop,
slots, window, journal with its fsyncs and commits are the real ones; only engine and trainer sleep. Every schedule gets the same
trajectories.

    bound = max(all generation / places, all training, longest chain)

is what no schedule of these slots can beat. The chain is that of dependent work with unlimited places: a group is admitted once the steps
are done that free its slot, and a step needs every group that the window does not let it pass. `X_share_of_bound` is the schedule's own
bound over its measured time, `X_speedup` how much faster than synchronous it was. The last line is one JSON object; times in seconds.

A run begins and ends with a batch that nothing overlaps, so a short one stays further below its bound. And where many more trajectories are
in flight than the engine has places, a chain also waits for places, of which the bound does not know: compare `--places`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.loop.fakes import FakeParts, FakeStream, FakeTrainers, config, group
from verst.config.schema import Config
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, Restored
from verst.types import Estimates, Group

BATCH, MEMBERS = 16, 8
SCHEDULES = {"sync": (1, 1), "one_step_off": (2, 1), "async": (3, BATCH), "async_wide": (6, 3 * BATCH)}
"""Slots, in batches, and the window in groups: those of `verst init --schedule`, and one that lets more groups pass late ones."""


@dataclass(frozen=True)
class Work:
    """What there is to do: seconds of each trajectory `[groups, members]`, of a training step, and places of the engine."""

    rolls_s: np.ndarray
    train_s: float
    places: int

    @property
    def steps(self) -> int:
        return len(self.rolls_s) // BATCH

    @classmethod
    def draw(cls, steps: int, train_s: float, places: int, sigma: float) -> Work:
        """Generation of a batch takes as long as its training, if all places are always busy."""
        lengths = np.random.default_rng(0).lognormal(sigma=sigma, size=(steps * BATCH, MEMBERS))
        return cls(lengths * (train_s * steps * places / lengths.sum()), train_s, places)

    def bound_s(self, capacity: int, window: int) -> float:
        """Seconds that no schedule of so many slots and such a window can beat; see the module's docstring."""
        longest = self.rolls_s.max(axis=1)
        done = [0.0]  # by steps
        for step in range(1, self.steps + 1):
            needed = range(max(0, step * BATCH - window + 1))
            ready = max((done[max(0, math.ceil((g - capacity + 1) / BATCH))] + longest[g] for g in needed), default=0.0)
            done.append(max(done[-1], ready) + self.train_s)
        return max(float(self.rolls_s.sum()) / self.places, self.steps * self.train_s, done[-1])


class Trainer(FakeTrainers):
    """Takes its time in the backward pass."""

    train_s = 0.0

    async def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[Any] = ()) -> Any:
        await asyncio.sleep(self.train_s)
        return await super().forward_backward(update, advantages, returns)


def configured(work: Work, batches: int, window: int) -> Config:
    rollout: dict[str, Any] = {"group_size": MEMBERS, "capacity_groups": batches * BATCH, "deadline_s": 600}
    if batches > 1:
        rollout["window_groups"] = window
    return config(run={"steps": work.steps}, train={"groups_per_step": BATCH}, rollout=rollout, checkpoint={"every_steps": 10**6})


async def measured_s(work: Work, batches: int, window: int, directory: Path) -> tuple[float, float]:
    """Seconds of a whole run, and the largest staleness in it."""
    places = asyncio.Semaphore(work.places)

    async def decode(seconds: float) -> None:
        async with places:
            await asyncio.sleep(seconds)

    async def roll(seq: int, version: int) -> Group:
        await asyncio.gather(*(decode(s) for s in work.rolls_s[seq]))
        return group(seq, version)

    cfg = configured(work, batches, window)
    parts = FakeParts(cfg, directory, roll, delay_s=0.0)
    parts.group_deadline_s = 600.0
    parts.trainers = Trainer(parts.events)
    parts.trainers.train_s = work.train_s
    loop = Loop(cfg, cast(Parts, parts), Restored(0, Cursor(0, FakeStream().state())))
    began = time.perf_counter()
    await loop._train()  # without the checkpoint at the end
    return time.perf_counter() - began, max(row["staleness/max"] for row in parts.rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train-s", type=float, default=0.4)
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=1.0)
    options = parser.parse_args()
    work = Work.draw(options.steps, options.train_s, options.places, options.sigma)
    bounds = {name: work.bound_s(batches * BATCH, window) for name, (batches, window) in SCHEDULES.items()}
    result: dict[str, float] = {"steps": work.steps, "places": work.places}
    print(f"{'schedule':<14}{'slots':>6}{'window':>8}{'seconds':>9}{'bound':>8}{'of own':>8}{'staleness':>11}{'at most':>9}")
    for name, (batches, window) in SCHEDULES.items():
        with tempfile.TemporaryDirectory(prefix="async-") as directory:
            seconds, stale = asyncio.run(measured_s(work, batches, window, Path(directory)))
        allowed = configured(work, batches, window).worst_staleness
        own = bounds[name] / seconds
        print(
            f"{name:<14}{batches * BATCH:>6}{window:>8}{seconds:>9.2f}{bounds[name]:>8.2f}{own:>8.1%}{stale:>11.0f}{allowed:>9}", flush=True
        )
        result |= {f"{name}_s": seconds, f"{name}_share_of_bound": own, f"{name}_speedup": result.get("sync_s", seconds) / seconds}
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
