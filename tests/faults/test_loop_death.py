"""SIGKILL of the loop's own process, of all processes of a run at once, and of twenty of any kind.

What a loop has started outlives it, and the loop that Ray starts in its place takes it up. A run of which nothing lives is resumed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.campaign import MOMENTS, Cell, digests, require_sound
from tests.faults.conftest import run_of
from tests.faults.mortal import LOOP, TREE, lives, struck
from tests.faults.test_kills import VICTIMS
from tests.loop.local import LocalRun

KILLS = 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def unchanged(run: LocalRun, cells: list[Cell], undisturbed: list[str]) -> str:
    """Returns all output of a run that has its faults."""
    output = "".join(lives(run, cells))
    assert digests(run) == undisturbed[: len(digests(run))]
    require_sound(run, run.run.run_id)
    return output


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 - shown by pytest if the test fails
    return random.Random(seed)


def test_a_loop_that_is_killed_goes_on_with_the_processes_that_live(tmp_path: Path, model: Path, undisturbed: list[str]):
    run = run_of(tmp_path, model, 8, checkpoint={"every_steps": 8})
    output = unchanged(run, [Cell(LOOP, "mid-optimizer"), Cell(LOOP, "mid-publish")], undisturbed)
    assert output.count("it starts again and goes on from its journal") == 2
    assert output.count("the loop starts again with processes that live: 2 trainer rank(s), 1 replica(s)") == 2
    assert "(memory)" in output


@pytest.mark.faults
@pytest.mark.parametrize("victim", [LOOP, TREE])
def test_a_kill_at_every_moment(tmp_path: Path, model: Path, undisturbed: list[str], victim: str):
    unchanged(run_of(tmp_path, model, 20), [Cell(victim, moment) for moment in MOMENTS], undisturbed)


@pytest.mark.faults
def test_twenty_kills_of_anyone(tmp_path: Path, model: Path, undisturbed: list[str]):
    """Everyone at least twice, in any order and at any moment."""
    rng, roles = seeded(), [*VICTIMS, LOOP, TREE]
    victims = [*roles * 2, *rng.choices(roles, k=KILLS - 2 * len(roles))]
    rng.shuffle(victims)
    run = run_of(tmp_path, model)
    unchanged(run, [Cell(victim, rng.choice([*MOMENTS])) for victim in victims], undisturbed)
    assert len(struck(run.run.root.with_suffix(".plan"))) == KILLS
