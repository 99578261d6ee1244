"""A whole run whose trajectories an agent makes, with OpenAI's client."""

from __future__ import annotations

import asyncio
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import verst
from tests.loop.local import local_run
from tests.loop.test_run import ROWS, vowels
from verst.data.chat import ChatRenderer, load_tokenizer
from verst.journal.audit import audit
from verst.journal.log import JournalReader
from verst.rollout.agent import Agents
from verst.rollout.sessions import Session
from verst.types import FinishReason, Message, Prompt, Status

EXAMPLE = Path(__file__).parents[2] / "examples/agents/double_check.py"
pytestmark = pytest.mark.slow


async def test_an_agent_with_openais_client_is_trained(tmp_path: Path, model: Path):
    agents = Agents(runpy.run_path(str(EXAMPLE))["solve"], question="Sure?")
    values = {"run": {"steps": 2}, "rollout": {"max_turns": 2}, "data": {"max_prompt_tokens": 64}}
    run = await local_run(tmp_path, model, values, environment=agents, reward=vowels, prompts=ROWS).go()
    assert max(run.metric("mismatch/abs_max")) < 1e-5
    assert min(run.metric("update/grad_norm")) > 0
    assert run.metric("rollout/failed") == [0, 0]
    renderer = ChatRenderer(load_tokenizer(model))
    reader = JournalReader(run.run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    assert {len(trajectory.turns) for trajectory in found} <= {1, 2}  # one, where the first answer reached its limit
    whole = [trajectory for trajectory in found if len(trajectory.turns) == 2]
    assert whole
    for trajectory in whole:
        first, second = trajectory.turns
        opening_T = renderer.opening(trajectory.messages[:1])
        assert trajectory.tokens_T[: first.generated].tolist() == opening_T.tolist()
        assert trajectory.messages[2] == Message("user", "Sure?")
        assert trajectory.loss_mask_T[first.generated : first.end].all()
        assert not trajectory.loss_mask_T[first.end : second.generated].any()
        assert trajectory.loss_mask_T[second.generated :].all()
        if trajectory.status is Status.FINISHED:
            assert isinstance(trajectory.info["changed"], bool)


async def test_an_agent_that_breaks_costs_its_own_trajectory(tmp_path: Path, model: Path):
    async def breaks(session: Session, prompt: Prompt) -> dict[str, Any]:
        answer = await session.complete(prompt.messages)
        if answer.tokens[0] % 3 == 0:
            raise LookupError("the room is gone")
        return {"fine": True}

    run = await local_run(tmp_path, model, {"run": {"steps": 2}}, environment=Agents(breaks), reward=vowels, prompts=ROWS).go()
    failed = run.metric("rollout/failed")
    assert sum(failed) > 0
    reader = JournalReader(run.run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    for trajectory in found:
        broke = int(trajectory.tokens_T[trajectory.turns[0].generated]) % 3 == 0
        assert (trajectory.status is Status.FAILED) == broke
        assert ("the room is gone" in (trajectory.error or "")) == broke


async def branching(session: Session, prompt: Prompt) -> dict[str, Any]:
    """Two answers to one prompt at once, a question about one of them, and then one about an answer that it has changed."""
    messages = list(prompt.messages)
    first, second = await asyncio.gather(session.complete(messages), session.complete(messages))
    last = first
    for said in (first.text, second.text.upper() + "!"):
        if not {first.finish, second.finish} & {FinishReason.LENGTH}:
            last = await session.complete([*messages, Message("assistant", said), Message("user", "And?")])
    tokens = len(first.tokens) + len(second.tokens)
    return {"both": tokens, "last": last.text}


@pytest.mark.parametrize("algorithm", [{"name": "grpo", "aggregate": "sequence_mean"}, {"name": "ppo"}, {"name": "online_dpo"}], ids=str)
async def test_an_agent_whose_conversations_branch_is_trained_and_replayed(tmp_path: Path, model: Path, algorithm: dict[str, str]):
    values = {
        "run": {"steps": 3},
        "rollout": {"max_turns": 4, "group_size": 4, "max_new_tokens": 24, "stop": [*"aeiou"], "max_running": 16},
        "train": {"groups_per_step": 2, "minibatches": 2, "lr": 1e-2, "threads": 1, "microbatch_tokens": 4096},
        "algorithm": algorithm,
        "checkpoint": {"every_steps": 2},
    }
    run = await local_run(tmp_path, model, values, environment=Agents(branching), reward=vowels, prompts=ROWS).go()
    assert max(run.metric("mismatch/abs_max")) < 1e-5
    assert min(run.metric("update/grad_norm")) > 0
    assert run.metric("rollout/failed") == [0, 0, 0]
    assert min(run.metric("rollout/branches")) >= 1
    assert audit(run.run.journal, run.run.run_id, exact=True).violations == []
    reader = JournalReader(run.run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    assert max(len(trajectory.branches) for trajectory in found) == 2
    for trajectory in found:
        assert trajectory.info["last"] == trajectory.completion or len(trajectory.branches) == 1
        assert trajectory.generated_tokens == sum(int(one.loss_mask_T.sum()) for one in trajectory.sequences) >= trajectory.info["both"]
    replayed = await asyncio.to_thread(partial(verst.replay, run.run.root, 0, echo=[].append))
    assert [step.same for step in replayed.steps] == [True] * 3
