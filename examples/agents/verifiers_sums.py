"""An environment of verifiers: `rollout.environment: verifiers:verifiers_sums`, started here. It knows nothing of Verst."""

from __future__ import annotations

from typing import Any

import verifiers as vf  # pyright: ignore
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def right(completion: Any, answer: str) -> float:
    return float(str(completion[-1]["content"]).rstrip(".").endswith(answer))


def load_environment(count: int = 100) -> vf.Environment:
    data = Dataset.from_list([{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)])
    return vf.ToolEnv(tools=[add], dataset=data, max_turns=3, rubric=vf.Rubric(funcs=[right]))
