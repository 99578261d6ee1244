"""What `verst check` says a GPU holds when trainer and replicas share it."""

from __future__ import annotations

from typing import Any

import pytest

from verst.config.plan import plan_lines
from verst.config.schema import Config
from verst.testing import tiny_model

# 259 tokens, width 32, two layers (4 heads, 2 of keys and values, 64 inside): embedding, head, and for each layer
# q and o (32 × 32), k and v (32 × 16), gate, up and down (32 × 64), two norms; one norm at the end
PARAMETERS = 2 * 259 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
CACHE = 2 * 2 * 2 * 8 * 2 * 4 * (64 + 16)  # keys and values, layers, heads, width, bytes, sequences, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def shared_lines(model: str, ranks: int, replicas: int, **sections: dict[str, Any]) -> list[str]:
    config = Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": model, "dtype": "bfloat16"},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"replicas": replicas, "max_new_tokens": 16, "max_running": 4},
            "train": {"ranks": ranks},
            **sections,
        }
    )
    return [line for line in plan_lines(config) if "share" in line and "GPU" in line]


def kib(count: float) -> str:
    return f"{count / 1024:.1f} KiB"


def test_each_turn_of_one_gpu(model: str):
    trainer = kib(PARAMETERS * 18)  # masters, two moments, gradients in float32 and the model in bfloat16
    rolling, transfer = kib(2 * PARAMETERS + CACHE), kib(4 * PARAMETERS + CACHE)
    assert shared_lines(model, 1, 1) == [
        f"if 1 replica(s) share the GPU(s) of 1 rank(s), a GPU holds {trainer} and activations while training, {transfer} (the trainer's "
        f"weights too) in a transfer, {rolling} while rolling; what the trainer gives up waits in host memory"
    ]


def test_by_file_the_trainer_holds_nothing_in_a_transfer(model: str):
    rolling = kib(2 * (2 * PARAMETERS + CACHE))  # two replicas on each GPU
    (line,) = shared_lines(model, 2, 4, weights={"transport": "file"})
    assert f"a GPU holds {kib(PARAMETERS * 9)} and activations while training, {rolling} in a transfer, {rolling} while rolling" in line


def test_what_cannot_share_says_nothing(model: str):
    assert shared_lines(model, 2, 3) == shared_lines(model, 1, 1, weights={"transport": "group"}) == []
