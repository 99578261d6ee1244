"""A whole run whose trajectories a rollout function makes, token by token."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.loop.local import local_run
from tests.loop.test_run import ROWS, vowels
from verst.data.chat import ChatRenderer, load_tokenizer
from verst.journal.log import JournalReader
from verst.rollout.rollouts import Rollouts

EXAMPLE = Path(__file__).parents[2] / "examples/rollouts/budget.py"
pytestmark = pytest.mark.slow


async def test_what_a_rollout_function_rolled_is_trained(tmp_path: Path, model: Path):
    rollouts = Rollouts(runpy.run_path(str(EXAMPLE))["think"], thought=3, then="So: ")
    values = {"run": {"steps": 2}, "rollout": {"max_turns": 2}}
    run = await local_run(tmp_path, model, values, environment=rollouts, reward=vowels, prompts=ROWS).go()
    assert max(run.metric("mismatch/abs_max")) < 1e-5
    assert min(run.metric("update/grad_norm")) > 0
    assert run.metric("rollout/failed") == [0, 0]
    renderer = ChatRenderer(load_tokenizer(model))
    reader = JournalReader(run.run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    told = [trajectory for trajectory in found if len(trajectory.turns) == 2]
    assert told
    for trajectory in told:
        first, second = trajectory.turns
        assert first.end - first.generated == 3
        assert renderer.tokenizer.decode(trajectory.tokens_T[second.start : second.generated]) == "So: "
        assert trajectory.info == {"cut": True}
        assert trajectory.loss_mask_T.sum() == 3 + second.end - second.generated


async def test_a_generate_function_of_slime_is_trained(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(EXAMPLE.parent)
    values = {"run": {"steps": 2}, "rollout": {"environment": "slime:from_slime:generate", "max_turns": 3}}
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    assert max(run.metric("mismatch/abs_max")) < 1e-5
    assert min(run.metric("update/grad_norm")) > 0
    assert run.metric("rollout/failed") == [0, 0]
