"""What a teacher says of a group, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_codec import group_of, trajectory
from verst.algorithms.losses import TEACHER
from verst.config.plan import plan_lines
from verst.config.schema import Config
from verst.errors import EngineFailure
from verst.fields import PerSample, PerToken
from verst.rollout.teacher import Teacher
from verst.runtime.limits import group_deadline_s, teacher_deadline_s
from verst.runtime.placement import Placement, place
from verst.testing import FakeEngine, tiny_model
from verst.types import Status


class Answering(FakeEngine):
    """Whose log-probabilities are given; None breaks it."""

    def __init__(self, given: np.ndarray | None) -> None:
        super().__init__([[1]])
        self.given = given

    async def logprobs(self, tokens_T: Any) -> Any:
        if self.given is None:
            raise EngineFailure("its thread died")
        return self.given[: len(tokens_T)]


async def test_each_generated_token_has_what_the_teacher_says_of_it():
    said = np.arange(0, -6, -1, dtype=np.float32)
    rows = [trajectory("4/0", 6), trajectory("4/1", 4, fields={"x": PerSample(1)}), trajectory("4/2", 6).failed("broke")]
    group = await Teacher(Answering(said)).judge(group_of(*rows))
    assert [t.id for t in group.trajectories] == ["4/0", "4/1", "4/2"]
    assert group.trajectories[0].fields == {TEACHER: PerToken([-3, -4, -5])}
    assert group.trajectories[1].fields == {"x": PerSample(1), TEACHER: PerToken([-2, -3])}
    assert group.trajectories[2] == rows[2], "what has failed is not trained, so nobody asks"
    assert group.timings["teacher_s"] >= 0
    asked = await FakeEngine([[1]]).logprobs(rows[0].tokens_T)
    by_the_protocol = await Teacher(FakeEngine([[1]])).judge(group_of(rows[0]))
    assert by_the_protocol.trajectories[0].fields == {TEACHER: PerToken(asked[3:])}


async def test_what_cannot_be_trained_fails_its_trajectory_and_a_broken_teacher_the_group():
    impossible = np.array([0, -1, -1, -1, -np.inf, -1], np.float32)
    rows = [trajectory("4/0", 6), trajectory("4/1", 4), trajectory("4/2", 4, fields={TEACHER: PerSample(1)})]
    first, second, third = (await Teacher(Answering(impossible)).judge(group_of(*rows))).trajectories
    token = rows[0].tokens_T[4]
    assert (first.status, second.status, third.status) == (Status.FAILED, Status.FINISHED, Status.FAILED)
    assert first.error == f"the teacher gives its generated token 1 ({token}) the log-probability -inf"
    assert str(third.error).startswith("its environment gives a field 'teacher_logprobs', which is that of algorithm distill")
    with pytest.raises(EngineFailure, match="the teacher failed: its thread died"):
        await Teacher(Answering(None)).judge(group_of(*rows))


def config(path: str = "m", ranks: int = 1, replicas: int = 1, **algorithm: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": path},
            "train": {"ranks": ranks},
            "rollout": {"replicas": replicas},
            "algorithm": algorithm or {"name": "distill", "teacher": path},
        }
    )


@pytest.mark.parametrize(
    ("ranks", "replicas", "gpus", "expected", "device"),
    [
        (1, 1, 0, Placement(0, 0), "cpu"),
        (1, 1, 1, Placement(1 / 2, 1 / 2, shared=True), "cuda"),
        (1, 1, 2, Placement(1, 1), "cuda"),
        (1, 1, 3, Placement(1, 2), "cuda:1"),
        (2, 3, 7, Placement(1, 1), "cuda"),
        (2, 3, 8, Placement(1, 2), "cuda:1"),
    ],
)
def test_a_teacher_has_a_gpu_of_its_own_where_there_are_enough(ranks: int, replicas: int, gpus: int, expected: Placement, device: str):
    found = place(config(ranks=ranks, replicas=replicas), gpus)
    assert (found, found.teacher_device) == (expected, device)


def test_a_group_has_time_for_its_teacher():
    taught, alone = config(), config(name="grpo")
    assert teacher_deadline_s(alone) == 0
    assert teacher_deadline_s(taught) > 0
    found = group_deadline_s(taught, 8, shared=False) - group_deadline_s(alone, 8, shared=False)
    assert found == pytest.approx(teacher_deadline_s(taught))


def test_the_plan_has_the_teachers_memory(tmp_path: Path):
    path = str(tiny_model(tmp_path / "m"))
    # 35,168 parameters, and keys and values of 2 layers x 2 heads x 8 for each of 1,280 tokens, in float32.
    (line,) = [line for line in plan_lines(config(path)) if "teacher" in line]
    assert line == f"memory of the teacher beside each replica: {(35_168 + 2 * 2 * 2 * 8 * 1_280) * 4 / 1024:.1f} KiB ({path})"
    assert not [line for line in plan_lines(config(path, name="grpo")) if "teacher" in line]
