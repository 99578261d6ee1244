"""A run on Megatron-Core resumed on another layout: tensor parallel, then pipeline parallel, then one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

import verst
from tests.loop.conftest import one_ray
from tests.loop.test_resume_ranks import STEPS, config, crashed, largest_difference
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


def test_from_tensor_to_pipeline_parallelism_and_to_one_rank(tmp_path: Path):
    tiny_model(tmp_path / "model")
    told: list[str] = []
    values = config(tmp_path, "whole", STEPS)
    train = values["train"] | {"backend": "megatron", "megatron": {"tensor_model_parallel_size": 2}}
    whole = verst.train(values | {"train": train}, echo=told.append)
    staged = crashed(whole.path, 2, tmp_path / "staged")
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size × pipeline_model_parallel_size × context_parallel_size \(4\)"):
        verst.resume(staged, overrides=[f"{PP}=2"], echo=told.append)
    verst.resume(staged, overrides=[f"{TP}=null", f"{PP}=2"], echo=told.append)
    assert f"{PP}: None -> 2" in told
    assert 0 < largest_difference(staged, whole.path) < 2e-5
    alone = crashed(staged, 3, tmp_path / "alone")  # its checkpoint is of two stages
    verst.resume(alone, overrides=[f"{PP}=null", "train.ranks=1"], echo=told.append)
    assert 0 < largest_difference(alone, whole.path) < 2e-5
