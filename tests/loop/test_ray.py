"""A whole run under Ray whose weights are broadcast, not written: trainer and replicas are processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

import verst
from verst.testing import tiny_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of sockets of its own
def test_weights_by_broadcast(tmp_path: Path):
    config = {
        "run": {"dir": str(tmp_path), "steps": 2},
        "model": {"path": str(tiny_model(tmp_path / "model"))},
        "data": {"task": "chain_sum", "max_prompt_tokens": 128},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16, "replicas": 2},
        "reward": {"function": "tests.loop.rewards:spread"},
        "train": {"groups_per_step": 4, "lr": 1e-3},
        "weights": {"transport": "group"},
        "checkpoint": {"export_final": False},
    }
    result = verst.train(config, echo=lambda line: None)
    rows = [row for row in result.rows if row["kind"] == "step"]
    assert [row["update/grad_norm"] > 0 for row in rows] == [True, True]  # version 1 differs from version 0
    assert [row["mismatch/probe_version"] for row in rows] == [0, 1]
    assert max(row["mismatch/probe"] for row in rows) < 1e-5
    assert max(row["mismatch/abs_max"] for row in rows) < 1e-5  # in step 2: of tokens that broadcast weights generated
