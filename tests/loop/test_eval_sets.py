"""Named sets in a run, and its best checkpoint: measured on their own cadence, never trained on, and there again after a crash."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.loop.local import LocalRun, local_run, stopped_after
from verst.errors import VerstError
from verst.journal.log import JournalReader
from verst.runtime.listing import summarize
from verst.runtime.observer import Observer
from verst.runtime.parts import Parts
from verst.runtime.stored import Best, best_of, checkpoint_of, checkpoint_steps, parse_reference

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]

pytestmark = pytest.mark.usefixtures("_one_thread")


def vowels(trajectory: Any, fields: Any) -> float:
    """A reward that varies between the members of a group."""
    return float(sum(map(ord, trajectory.completion)) % 5)


def made(directory: Path, model: Path, sets: dict[str, Any], **sections: dict[str, Any]) -> LocalRun:
    values = {"eval": {"sets": sets}, "checkpoint": {"every_steps": 2}, **sections}
    return local_run(directory, model, values, reward=vowels, prompts=ROWS)


def spelled(directory: Path, count: int = 3) -> str:
    path = directory / "spelled.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"spell {i}"}) + "\n" for i in range(count)))
    return str(path)


async def test_sets_are_measured_and_change_no_token_that_is_trained(tmp_path: Path, model: Path):
    """Beside a run that evaluates nothing: the same prompts, tokens and weights, step by step."""
    path = spelled(tmp_path)
    sets = {
        "spell": {"path": path, "every_steps": 2, "samples": 4, "temperature": 1.0},
        "greedy": {"path": path, "every_steps": 3, "prompts": 2, "system": "Be brief."},
    }
    evaluated = await made(tmp_path / "a", model, sets).go()
    plain = await made(tmp_path / "b", model, {}).go()
    found = {(row["kind"], row["step"]): {name for name in row if name.startswith("eval/")} for row in evaluated.rows}
    spell = {f"eval/spell/{name}" for name in ("reward", "failed", "generated_tokens", "pass_at_1", "pass_at_2", "pass_at_4")}
    greedy = {f"eval/greedy/{name}" for name in ("reward", "failed", "generated_tokens")}
    assert found == {("evaluation", 0): spell | greedy, ("step", 1): set(), ("step", 2): spell, ("step", 3): spell | greedy}
    assert any(line.startswith("before training: eval/spell/reward ") and "eval/greedy/reward" in line for line in evaluated.lines)
    with_sets, without = JournalReader(evaluated.run.journal), JournalReader(plain.run.journal)
    assert len(with_sets.index.groups) == len(without.index.groups) == 12
    for step in (1, 2, 3):
        assert with_sets.commit(step).digest == without.commit(step).digest
        assert with_sets.batch(step).groups == without.batch(step).groups
        for seq in with_sets.batch(step).groups:
            one, other = with_sets.group(seq), without.group(seq)
            assert one.prompt.messages[0].content.startswith("count")
            assert [t.tokens_T.tolist() for t in one.trajectories] == [t.tokens_T.tolist() for t in other.trajectories]


async def test_an_evaluation_that_a_crash_took_is_made_as_the_run_is_resumed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """The step has its checkpoint, so it is not trained again: without this nobody would measure it."""
    run = made(tmp_path, model, {"spell": {"path": spelled(tmp_path), "every_steps": 2}})
    evaluate = Parts.evaluate

    async def crash(self: Parts, step: int) -> dict[str, float]:
        if step == 2:
            await asyncio.wait_for(written.wait(), 30)
            raise VerstError("crashed on purpose")
        return await evaluate(self, step)

    def told(self: Observer, step: int) -> None:
        checkpoint_written(self, step)
        if step == 2:
            written.set()

    written, checkpoint_written = asyncio.Event(), Observer.checkpoint_written
    monkeypatch.setattr(Observer, "checkpoint_written", told)
    monkeypatch.setattr(Parts, "evaluate", crash)
    with pytest.raises(VerstError, match="crashed on purpose"):
        await run.go()
    monkeypatch.setattr(Parts, "evaluate", evaluate)
    await run.go()
    assert any(line.startswith("step 2: eval/spell/reward ") for line in run.lines)
    assert [(row["kind"], row["step"]) for row in run.rows if "eval/spell/reward" in row] == [
        ("evaluation", 0),
        ("evaluation", 2),
        ("step", 3),
    ]
    before = len(run.rows)
    await run.go()  # of a run that has everything, nothing is measured again
    assert len(run.rows) == before


async def test_the_best_checkpoint_outlives_newer_ones_and_a_crash(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps 2 and 3 are equally good, so it is step 2; step 4 could not be scored, step 0 has no checkpoint. One more is kept."""
    values = {0: 9.0, 1: 0.25, 2: 0.75, 3: 0.75, 4: float("nan"), 5: 0.5}
    measured: list[int] = []

    async def evaluate(self: Parts, step: int) -> dict[str, float]:
        measured.append(step)
        return {"eval/spell/reward": values[step], "eval/spell/failed": 0.0}

    monkeypatch.setattr(Parts, "evaluate", evaluate)
    run = made(
        tmp_path,
        model,
        {"spell": {"path": spelled(tmp_path), "every_steps": 1}},
        run={"name": "run", "dir": str(tmp_path), "steps": 5, "seed": 1},
        checkpoint={"every_steps": 50, "keep": 1, "best": "eval/spell/reward"},
    )
    await stopped_after(run, 3)
    assert best_of(run.run) == Best("eval/spell/reward", 2, 0.75)
    await run.go()
    assert measured[:4] == [0, 1, 2, 3]
    assert measured[-2:] == [4, 5]
    assert json.loads(run.run.best.read_text()) == {"metric": "eval/spell/reward", "step": 2, "value": 0.75}
    assert checkpoint_steps(run.run) == [2, 5]
    assert checkpoint_of(run.run, parse_reference(f"{run.run.root}@best")[1]).step == 2
    assert summarize(run.run.root).best == Best("eval/spell/reward", 2, 0.75)
