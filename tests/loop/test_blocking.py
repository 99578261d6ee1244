"""A whole run with an environment that now and then blocks its event loop: it costs that trajectory, and the run goes on."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from tests.loop.local import local_run
from tests.loop.test_run import ROWS, vowels
from verst.journal.log import JournalReader
from verst.rollout import user_loop
from verst.types import Completion, Message, Prompt, Reply, Status

pytestmark = pytest.mark.slow


class Blocks:
    """The second of its trajectories waits in C, and the seventh computes."""

    numbers = itertools.count()

    async def start(self, prompt: Prompt) -> tuple[Message, ...]:
        self.number = next(self.numbers)
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        if self.number == 1:
            time.sleep(60)  # noqa: ASYNC251 - the mistake in question
        while self.number == 6:
            pass
        return Reply(info={"number": self.number})


async def test_user_code_that_blocks_costs_its_own_trajectory(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GRACE_S", "_WATCH_S", "_YIELD_S"):
        monkeypatch.setattr(user_loop, name, 0.3)
    values = {"run": {"steps": 3}, "rollout": {"deadline_s": 16.0}}  # of which one step may take a quarter
    run = await local_run(tmp_path, model, values, environment=Blocks, reward=vowels, prompts=ROWS).go()
    reader = JournalReader(run.run.journal)
    found = [trajectory for seq in reader.index.groups for trajectory in reader.group(seq).trajectories]
    failed = [str(trajectory.error) for trajectory in found if trajectory.status is Status.FAILED]
    assert len(failed) == 2
    assert all(error.startswith("environment Blocks: reply in turn 1: blocks its event loop in reply (") for error in failed)
    assert all(trajectory.turns for trajectory in found)
    assert {trajectory.info.get("number") for trajectory in found} >= {*range(16)} - {1, 6}
