"""Processes of a real run are killed or stopped, one after another, at chosen moments. The run must not show it in its weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import MOMENTS, Campaign, Cell, digests, replay_equals, require_sound, under
from tests.faults.conftest import STEPS, Make, run_of
from tests.loop.local import LocalRun
from tests.loop.rewards import slow, steady
from verst.journal.log import JournalReader
from verst.types import Status

VICTIMS = ("trainer rank 0", "trainer rank 1", "replica", "reward worker", "snapshot holder 0")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("token", "one_ray")]


async def unchanged(campaign: Campaign, run: LocalRun, token: str, undisturbed: list[str]) -> None:
    await under(campaign, run)
    assert campaign.unstruck == []
    assert digests(run) == undisturbed[: len(digests(run))]
    require_sound(run, token)


async def test_some_kills(tmp_path: Path, model: Path, token: str, campaign: Make, undisturbed: list[str]):
    """Another four each time, of different victims."""
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    cells = [Cell(victim, rng.choice(list(MOMENTS))) for victim in rng.sample(VICTIMS, 4)]
    print(f"seed {seed}: {', '.join(map(str, cells))}")  # noqa: T201 - shown by pytest if the test fails
    await unchanged(campaign(cells), run_of(tmp_path, model, 10), token, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("victim", VICTIMS)
async def test_a_kill_at_every_moment(tmp_path: Path, model: Path, token: str, campaign: Make, undisturbed: list[str], victim: str):
    await unchanged(campaign([Cell(victim, moment) for moment in MOMENTS]), run_of(tmp_path, model, 40), token, undisturbed)


@pytest.mark.faults
@pytest.mark.usefixtures("soon_silent")
@pytest.mark.parametrize(
    ("victim", "steps", "reward"),
    [("trainer rank 0", 14, steady), ("trainer rank 1", 14, steady), ("replica", 14, steady), ("snapshot holder 0", STEPS, slow)],
)
async def test_a_hang(
    tmp_path: Path, model: Path, token: str, campaign: Make, undisturbed: list[str], victim: str, steps: int, reward: Any
):
    """A holder holds up no step, so its steps have to take the time in which its silence is noticed."""
    cells = [Cell(victim, moment, kill=False) for moment in ("generating", "mid-all-reduce", "mid-publish", "mid-checkpoint")]
    await unchanged(campaign(cells), run_of(tmp_path, model, steps, scored_by=reward), token, undisturbed)


@pytest.mark.faults
async def test_a_reward_worker_that_hangs_costs_the_trajectory_that_it_had_at_most(tmp_path: Path, model: Path, token: str, campaign: Make):
    """Nobody can tell it from a reward that is too slow."""
    run = run_of(tmp_path, model, 6, reward={"workers": 1, "deadline_s": 8.0})
    made = campaign([Cell("reward worker", moment, kill=False) for moment in ("scoring", "mid-forward")])
    await under(made, run)
    assert made.unstruck == []
    require_sound(run, token)
    reader = JournalReader(run.run.journal)
    failed = [t.error for seq in reader.index.groups for t in reader.group(seq).trajectories if t.status is Status.FAILED]
    assert failed in ([], ["reward steady exceeded 8 s: make it faster, or raise reward.deadline_s"])


@pytest.mark.faults
async def test_ahead_of_training(tmp_path: Path, model: Path, token: str, campaign: Make):
    """Every victim, while rollout runs ahead and early groups pass late ones: what is trained is in the journal."""
    moments = list(MOMENTS)
    cells = [Cell(victim, moments[(3 * n + k) % len(moments)]) for k in range(2) for n, victim in enumerate(VICTIMS)]
    values = {
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16, "capacity_groups": 12, "window_groups": 4},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
    }
    run = run_of(tmp_path, model, 28, **values)
    made = campaign(cells)
    await under(made, run)
    assert made.unstruck == []
    require_sound(run, token)
    await replay_equals(run)
