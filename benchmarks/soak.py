"""Ten thousand groups through the real loop: what one costs the core, and whether anything is lost or grows.

    python benchmarks/soak.py [--groups 10000]

Engine and trainer are fakes that take no time; loop, slots, window, journal (with its fsyncs), commits and timeline are the real ones, with
48 slots and a window of 16 for batches of 16. Groups finish out of order, and one in twenty fails and is dropped.

    core_ms_per_group     processor time of this process over all groups, that of the fakes included
    timeline_ms_per_step  of that: recording who worked when, and writing it
    growth_mb             resident memory at the end less that at a fifth of the groups; the journal's index of what is where is part of it

The benchmark stops if a group is trained twice or lost, a slot is left, or a token is older than the bound. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.loop.fakes import FakeParts, FakeStream, FakeTrainers, config, group
from verst.config.schema import Config
from verst.observe.timeline import Timeline
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, Restored
from verst.types import Group, Prompt

BATCH = 16
FAILS = 0.05


@dataclass
class Trainer(FakeTrainers):
    """Remembers how many groups it was given, and nothing of steps long past."""

    count: int = 0
    recent: dict[int, int] = field(default_factory=dict)

    async def optimizer_step(self, update: int) -> Any:
        for seq in self._batch.groups:
            assert seq not in self.recent, f"group {seq} was trained twice"
            self.recent[seq] = self._batch.step
        self.count += len(self._batch.groups)
        self.recent = {seq: step for seq, step in self.recent.items() if step > self._batch.step - 20}
        answer = await super().optimizer_step(update)
        self.trained.clear()
        self.events.clear()
        return answer


class SoakParts(FakeParts):
    """Rolls groups out of order; keeps no history, and reads the memory once a fifth is done."""

    def __init__(self, cfg: Config, directory: Path) -> None:
        self.random = random.Random(0)
        super().__init__(cfg, directory, self._made)
        self.trainers = Trainer(self.events)
        self.dropped, self.stalest, self.early_mb = 0, 0.0, 0.0
        self.lost: set[int] = set()
        self.timeline = Timeline(directory / "timeline.jsonl")
        self.timeline.replicas = lambda: range(2)
        self.timeline_s = 0.0

    async def roll(self, seq: int, prompt: Prompt, how: str) -> tuple[bytes, Group]:
        with self.timeline.group(seq, prompt.id, 0) as became:
            for _ in range(self.random.randrange(6)):
                await asyncio.sleep(0)
            self.rolled.clear()
            encoded, made = await super().roll(seq, prompt, how)
            became.append(made)
        return encoded, made

    def _made(self, seq: int, version: int) -> Group:
        return group(seq, version, (None, None) if self.random.random() < FAILS else (0.0, 1.0))

    def step(self, step: int, groups: Sequence[Group], metrics: dict[str, float], spans: Any) -> None:
        began = time.process_time()
        spans.report()
        assert self.timeline.step(step, groups, spans)["idle/trainer"] <= 1
        self.timeline_s += time.process_time() - began
        self.dropped += int(metrics["groups/dropped"])
        self.stalest = max(self.stalest, metrics["staleness/max"])
        if step == self.config.run.steps // 5:
            self.early_mb = resident_mb()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soaked(groups: int, directory: Path) -> dict[str, float]:
    """Raises `AssertionError` if anything was lost, repeated or too old."""
    rollout = {"group_size": 2, "capacity_groups": 3 * BATCH, "window_groups": BATCH, "deadline_s": 60.0}
    cfg = config(run={"steps": groups // BATCH}, train={"groups_per_step": BATCH}, rollout=rollout, checkpoint={"every_steps": 10**6})
    parts = SoakParts(cfg, directory)
    parts.delay_s = 0.0
    loop = Loop(cfg, cast(Parts, parts), Restored(0, Cursor(0, FakeStream().state())))
    processor, clock = time.process_time(), time.perf_counter()
    asyncio.run(loop._train())  # without the checkpoint at the end
    parts.timeline.close()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    trainer = cast(Trainer, parts.trainers)
    assert trainer.count == cfg.run.steps * BATCH
    assert parts.stalest <= cfg.worst_staleness
    assert loop._slots.held == 0
    journaled = sum(len(parts.journal.batch(s).groups) + len(parts.journal.batch(s).dropped) for s in range(1, cfg.run.steps + 1))
    assert journaled == trainer.count + parts.dropped
    return {
        "groups": trainer.count,
        "dropped": parts.dropped,
        "core_ms_per_group": 1000 * processor / trainer.count,
        "timeline_ms_per_step": 1000 * parts.timeline_s / cfg.run.steps,
        "wall_s": clock,
        "growth_mb": resident_mb() - parts.early_mb,
        "staleness": parts.stalest,
        "staleness_bound": cfg.worst_staleness,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        result = soaked(options.groups, Path(directory))
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
