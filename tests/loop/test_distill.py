"""On-policy distillation in whole runs: the student comes closer to its teacher, which says the same again when a run goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.loop.local import LocalRun, local_run, prompts_file, stopped_after
from verst.algorithms.losses import TEACHER
from verst.config.load import load_config
from verst.errors import EngineFailure, ModelError, VerstError
from verst.fields import PerToken
from verst.journal.log import JournalReader
from verst.rollout.teacher import Teacher
from verst.runtime.replay import replay
from verst.testing import tiny_model, tiny_tokenizer
from verst.types import Group

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", seed=7, initializer_range=0.3)


def distilled(directory: Path, model: Path, teacher: Path, values: dict[str, Any] | None = None, **extensions: Any) -> LocalRun:
    base: dict[str, Any] = {
        "data": {"path": prompts_file(directory), "max_prompt_tokens": 64},
        "algorithm": {"name": "distill", "teacher": str(teacher)},
        "checkpoint": {"every_steps": 50, "export_final": False},
    }
    return local_run(directory, model, base | (values or {}), **extensions)


def digests(run: LocalRun, steps: int) -> list[str]:
    return [JournalReader(run.run.journal).commit(step).digest for step in range(1, steps + 1)]


async def test_the_student_comes_closer_to_its_teacher_without_a_reward(tmp_path: Path, model: Path, teacher: Path):
    steps = 10
    values = {"run": {"name": "run", "dir": str(tmp_path), "steps": steps, "seed": 1}, "train": {"groups_per_step": 8, "lr": 1e-2}}
    run = await distilled(tmp_path, model, teacher, values | {"rollout": {"group_size": 8, "max_new_tokens": 16, "max_running": 64}}).go()
    divergence = run.metric("policy/teacher_kl")
    assert len(divergence) == steps
    assert np.mean(divergence[-3:]) < 0.92 * np.mean(divergence[:3])  # 3,072 tokens each
    journal = JournalReader(run.run.journal)
    for found in journal.group(0).trajectories:
        given = found.fields[TEACHER]
        assert isinstance(given, PerToken)
        assert found.reward is None
        assert len(given.values) == found.generated_tokens
        assert (given.values < 0).all()
    assert "reward" not in run.rows[1]


async def test_a_teacher_that_is_the_student_leaves_it_where_it_is(tmp_path: Path, model: Path):
    """Engine, teacher and trainer give each token the same log-probability, so advantage and gradient are 0 to the bit."""
    values = {
        "algorithm": {"name": "distill", "teacher": str(model), "old_logprobs": "behaviour"},
        "run": {"steps": 1, "dir": str(tmp_path)},
    }
    run = await distilled(tmp_path, model, model, values).go()
    (row,) = [row for row in run.rows if row.get("loss/total") is not None]
    assert row["policy/teacher_kl"] == row["loss/total"] == row["update/grad_norm"] == 0.0


def test_a_run_that_goes_on_and_a_replay_hear_the_same_of_the_teacher(tmp_path: Path, model: Path, teacher: Path):
    values = {"reward": {"function": "exact_match"}}
    whole = distilled(tmp_path, model, teacher, values | {"run": {"name": "whole", "dir": str(tmp_path), "steps": 3, "seed": 1}})
    asyncio.run(whole.go())
    assert whole.metric("reward") == [0.0] * 3, "a reward that is named is measured"
    again = distilled(tmp_path, model, teacher, values | {"run": {"name": "again", "dir": str(tmp_path), "steps": 3, "seed": 1}})
    asyncio.run(stopped_after(again, 1))
    asyncio.run(again.go())
    assert digests(again, 3) == digests(whole, 3)
    assert replay(whole.run.root, 0, echo=lambda line: None).first_difference is None


async def test_a_teacher_that_breaks_is_replaced_with_its_replica(
    tmp_path: Path, model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    judge, broken = Teacher.judge, list[int]()

    async def breaks_once(self: Teacher, group: Group) -> Group:
        if group.seq == 2 and not broken:
            broken.append(group.seq)
            raise EngineFailure("the teacher failed: told to")
        return await judge(self, group)

    monkeypatch.setattr(Teacher, "judge", breaks_once)
    run = await distilled(tmp_path, model, teacher).go()
    assert broken == [2]
    assert any("replica 0" in line and "the teacher failed: told to" in line for line in run.lines)
    assert JournalReader(run.run.journal).index.last_commit == 3


async def test_a_teacher_that_always_breaks_ends_the_run_with_the_reason(
    tmp_path: Path, model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    async def breaks(self: Teacher, group: Group) -> Group:
        raise EngineFailure("the teacher failed: told to")

    monkeypatch.setattr(Teacher, "judge", breaks)
    with pytest.raises(VerstError, match="the teacher failed: told to"):
        await distilled(tmp_path, model, teacher).go()


async def test_a_teacher_with_other_tokens_is_refused_as_the_run_starts(tmp_path: Path, model: Path):
    other = tiny_model(tmp_path / "other", vocab_size=300)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ModelError, match=r"algorithm.teacher .*other: its tokenizer is not the policy's: 259 and 260 tokens, of which 1 differ"
    ):
        await distilled(tmp_path, model, other).go()


def test_a_teacher_that_is_not_there_is_told_before_anything_starts(tmp_path: Path, model: Path):
    with pytest.raises(VerstError, match=r"algorithm.teacher: .*nowhere is not a directory"):
        distilled(tmp_path, model, tmp_path / "nowhere")
    short = tiny_model(tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(ModelError, match=r"algorithm.teacher: a trajectory may have 70 tokens, but .*short is made for 32"):
        distilled(tmp_path, model, short)


@pytest.mark.parametrize(("option", "shown"), [("temperature=0.7", "0.7"), ("top_p=0.9", "0.9"), ("top_k=20", "20"), ("min_p=0.1", "0.1")])
def test_what_the_teacher_is_not_asked_about_is_refused(option: str, shown: str):
    given = {"run": {"steps": 1}, "model": {"path": "m"}, "algorithm": {"name": "distill", "teacher": "t"}}
    load_config(given)
    with pytest.raises(VerstError, match=rf"rollout.{option.partition('=')[0]} is {shown}, but distill compares with the teacher's"):
        load_config(given, [f"rollout.{option}"])
