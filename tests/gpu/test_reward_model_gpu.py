"""The shipped reward model on a GPU, in the reward process of an actor that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.unit.test_reward_model import TEXTS, expected, said
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.testing import tiny_model
from verst.types import Group, Prompt

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers and the compiler
]


async def test_scores_are_those_of_transformers_on_a_cpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_labels": 1, "max_position_embeddings": 256}
    path = tiny_model(tmp_path / "model", kind=LlamaForSequenceClassification, **options)
    scorer = Scorer(RewardSpec("reward_model", {"path": str(path), "device": "cuda"}), workers=1, deadline_s=120, gpus=True)
    await scorer.start()
    try:
        scored = await scorer.score(Group(0, Prompt("p:0", ()), tuple(said(text, i) for i, text in enumerate(TEXTS)), 0))
    finally:
        scorer.close()
    assert [t.reward for t in scored.trajectories] == pytest.approx([expected(path, text) for text in TEXTS], abs=1e-3)
