"""Whole runs whose rewards are slow, hang, or wait for a service: scoring runs beside generation and holds up only its own group."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_rollout import run_of
from verst.journal.log import JournalReader
from verst.rewards.scorer import Scorer
from verst.rollout.hf.engine import HFEngine
from verst.types import GenerateRequest, Generation, Group, Status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_one_thread")]


def hangs_once(trajectory: Any, fields: Any) -> float:
    if trajectory.id == "1/2":
        time.sleep(60)
    return float(sum(map(ord, trajectory.completion)) % 7)


async def judged(trajectory: Any, fields: Any) -> float:
    """As a judge over HTTP, which takes longer for some."""
    await asyncio.sleep(1.0 if int(trajectory.id.split("/")[0]) % 4 == 3 else 0.2)
    return float(sum(map(ord, trajectory.completion)) % 7)


async def test_a_reward_that_hangs_holds_up_its_own_group_alone(tmp_path: Path, model: Path):
    run = await run_of(tmp_path, model, hangs_once, reward={"workers": 2, "deadline_s": 2.0}).go()
    reader = JournalReader(run.run.journal)
    assert 1 not in reader.batch(1).groups, "the other groups of the first step did not wait for it"
    (failed,) = [t for t in reader.group(1).trajectories if t.status is Status.FAILED]
    reason = "reward hangs_once exceeded 2 s: make it faster, or raise reward.deadline_s"
    assert (failed.id, failed.error) == ("1/2", reason)
    assert {reason: 1} in [row.get("failures") for row in run.rows]  # its three others are trained
    assert sum(run.metric("groups/dropped")) == 0
    assert max(reader.group(seq).timings["score_s"] for seq in (0, 2, 3)) < 2.0


async def test_a_judge_is_asked_for_many_groups_at_a_time_while_others_are_generated(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    generate, score = HFEngine.generate, Scorer.score
    generated: list[float] = []
    scored: list[tuple[float, float]] = []

    async def timed_generate(self: HFEngine, request: GenerateRequest) -> Generation:
        generated.append(time.monotonic())
        return await generate(self, request)

    async def timed_score(self: Scorer, group: Group) -> Group:
        begun = time.monotonic()
        try:
            return await score(self, group)
        finally:
            scored.append((begun, time.monotonic()))

    monkeypatch.setattr(HFEngine, "generate", timed_generate)
    monkeypatch.setattr(Scorer, "score", timed_score)
    await run_of(tmp_path, model, judged, run={"name": "run", "dir": str(tmp_path), "steps": 4, "seed": 1}).go()
    assert len(scored) >= 16
    assert sum(end - begin for begin, end in scored) / (max(e for _, e in scored) - min(b for b, _ in scored)) > 2  # groups at a time
    assert any(begin < moment < end for moment in generated for begin, end in scored)
