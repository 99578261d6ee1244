"""Fields in whole runs: from environment and reward into the loss, and out of the journal when steps are trained again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run, prompts_file, stopped_after
from verst.errors import ExtensionError
from verst.fields import Opaque, PerSample, PerToken
from verst.journal.log import JournalReader
from verst.rollout.environments import SingleTurn
from verst.runtime.replay import replay
from verst.types import Completion, Reply

pytestmark = pytest.mark.usefixtures("_one_thread")
EXAMPLES = Path(__file__).parents[2] / "examples/algorithms"


class Numbering(SingleTurn):
    """Gives each token its place, and each trajectory its length."""

    async def reply(self, completion: Completion) -> Reply:
        count = len(completion.tokens)
        return Reply(info={"place": PerToken(range(count)), "length": PerSample(count), "said": Opaque(completion.text)})


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(EXAMPLES)
    yield {
        "run": {"name": "run", "dir": str(tmp_path / "runs"), "steps": 2, "seed": 1},
        "data": {"path": prompts_file(tmp_path), "max_prompt_tokens": 64},
        "reward": {"function": "credit:reward"},
        "algorithm": {"name": "grpo", "loss": "credit:loss"},
        "checkpoint": {"every_steps": 50, "export_final": False},
    }
    sys.modules.pop("credit", None)


def digests(run: LocalRun) -> list[str]:
    return [JournalReader(run.run.journal).commit(step).digest for step in (1, 2)]


def test_the_example_trains_and_steps_trained_again_have_the_same_fields(tmp_path: Path, model: Path, values: dict[str, Any]):
    run = local_run(tmp_path, model, values, environment=Numbering)
    asyncio.run(stopped_after(run, 1))
    asyncio.run(run.go())
    journal = JournalReader(run.run.journal)
    for seq in journal.batch(1).groups:
        for found in journal.group(seq).trajectories:
            tokens = found.tokens_T[found.loss_mask_T].tolist()
            fresh = [token not in tokens[:place] for place, token in enumerate(tokens)]
            assert found.fields == {
                "place": PerToken(range(len(tokens))),
                "length": PerSample(len(tokens)),
                "said": Opaque(found.completion),
                "fresh": PerToken(fresh),
            }
            assert found.reward == pytest.approx(sum(fresh) / len(fresh))
    assert replay(run.run.root, 0, echo=lambda line: None).first_difference is None
    plain = local_run(tmp_path, model, values | {"run": values["run"] | {"name": "plain"}, "algorithm": {"name": "grpo"}})
    asyncio.run(plain.go())
    assert digests(run)[0] != digests(plain)[0], "the loss reads the field"


async def test_a_field_that_the_loss_reads_and_nobody_gives_ends_the_run(tmp_path: Path, model: Path, values: dict[str, Any]):
    run = local_run(tmp_path, model, values, reward=lambda trajectory, fields: float(len(trajectory.completion)))
    with pytest.raises(ExtensionError, match=r"loss loss raised KeyError: .*no sample of this batch has a field 'fresh'; they have: none"):
        await run.go()
    assert JournalReader(run.run.journal).index.last_commit == 0
