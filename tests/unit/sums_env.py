"""An environment as people write them for verifiers: a tool, a rubric of two functions, a small data set."""

from __future__ import annotations

import threading
import time
from typing import Any

import verifiers as vf  # pyright: ignore
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def exact(completion: Any, answer: str, **rest: Any) -> float:
    return float(answer in str(completion[-1]["content"]))


async def length(completion: Any) -> float:
    return float(len(completion))


def breaks(completion: Any) -> float:
    raise KeyError("no such thing")


def nan(completion: Any) -> float:
    return float("nan")


def slow(completion: Any) -> float:
    time.sleep(1.0)
    return 1.0


HELD, FREED = threading.Event(), threading.Event()


def stuck(completion: Any) -> float:
    if str(completion[-1]["content"]) == "hang":
        HELD.set()
        FREED.wait(60)
    return 1.0


def together(completions: Any) -> list[float]:
    return [0.0 for _ in completions]


def load_environment(count: int = 3, score: str = "exact") -> Any:
    data = Dataset.from_list([{"question": f"{i} + {i}?", "answer": str(2 * i), "info": {"i": i}} for i in range(count)])
    rubric = vf.Rubric(funcs=[globals()[score], length], weights=[1.0, 0.1])
    return vf.ToolEnv(tools=[add], dataset=data, max_turns=4, system_prompt="Use add.", rubric=rubric)


def no_environment() -> int:
    return 5


def fails() -> Any:
    raise OSError("the disk is gone")
