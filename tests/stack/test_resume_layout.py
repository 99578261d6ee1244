"""A run on Megatron-Core resumed on another layout: tensor parallel, then pipeline parallel, then one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

import verst
from tests.loop.conftest import one_ray
from tests.loop.test_resume_ranks import config, largest_difference, losses
from verst.errors import ConfigError
from verst.testing import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray warns of sockets of its own
    pytest.mark.usefixtures("one_ray"),
]

__all__ = ["one_ray"]  # the fixture, found by being here
TP, PP = "train.megatron.tensor_model_parallel_size", "train.megatron.pipeline_model_parallel_size"


def test_from_tensor_to_pipeline_parallelism_to_one_rank(tmp_path: Path):
    tiny_model(tmp_path / "model")
    told: list[str] = []

    def megatron(name: str, steps: int) -> dict[str, object]:
        values = config(tmp_path, name, steps)
        return values | {"train": values["train"] | {"backend": "megatron", "megatron": {"tensor_model_parallel_size": 2}}}

    whole = verst.train(megatron("whole", 4), echo=told.append)
    cut = verst.train(megatron("cut", 2), echo=told.append)
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size \(4\)"):
        verst.resume(cut.path, overrides=[f"{PP}=2"], echo=told.append)
    verst.resume(cut.path, overrides=[f"{TP}=null", f"{PP}=2", "run.steps=3"], echo=told.append)
    last = verst.resume(cut.path, overrides=[f"{PP}=null", "train.ranks=1", "run.steps=4"], echo=told.append)
    assert f"{PP}: 2 -> None" in told
    assert losses(last) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(cut.path, whole.path) < 2e-5
