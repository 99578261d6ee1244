"""The contract of a reward, run on the examples and on rewards that break it."""

from __future__ import annotations

import itertools
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from verst.errors import ExtensionError
from verst.rewards.shipped import ExactMatch
from verst.testing import check_reward, make_group

EXAMPLES = Path(__file__).parents[2] / "examples/rewards"
GROUP = make_group(["42", "It is 41", "no idea"], fields={"answer": "42"})


async def test_the_examples_keep_the_contract(monkeypatch: pytest.MonkeyPatch):
    assert len((EXAMPLES / "own.py").read_text().splitlines()) <= 30
    monkeypatch.chdir(EXAMPLES)
    assert await check_reward("own:score", [GROUP], close=0.2) == [[1.0, 0.2, 0.0]]
    assert await check_reward(runpy.run_path("own.py")["score"], [GROUP], close=0.5) == [[1.0, 0.5, 0.0]]
    assert await check_reward("trl:from_trl:correct", [GROUP]) == [[1.0, 0.0, 0.0]]
    assert await check_reward("slime:from_slime:rm", [GROUP], reward_key="score", penalty=0.5) == [[1.0, 0.0, 0.0]]
    assert await check_reward(ExactMatch, [GROUP, make_group(["7"], fields={"answer": "7"}, seq=1)]) == [[1.0, 0.0, 0.0], [1.0]]


def first_number(trajectory: Any, fields: Any) -> float:
    return float(trajectory.completion.split()[-1])


class Counts:
    def __init__(self) -> None:
        self.count = itertools.count()

    def __call__(self, trajectory: Any, fields: Any) -> int:
        return next(self.count)


class AsyncCounts:
    def __init__(self) -> None:
        self.count = itertools.count()

    async def __call__(self, trajectory: Any, fields: Any) -> int:
        return next(self.count)


def says_nothing(trajectory: Any, fields: Any) -> None: ...


def naps(trajectory: Any, fields: Any) -> float:
    time.sleep(5)
    return 0.0


@pytest.mark.parametrize(
    ("found", "group", "expected"),
    [
        (first_number, make_group(["4", "5"]), "expected a number for '': .*IndexError"),
        (Counts, make_group(["4"]), r"expected the rewards of group 0 to be the same again: \[0.0\] and \[1.0\]"),
        (AsyncCounts, make_group(["4", "5"]), "to be the same again"),
        (says_nothing, make_group(["4"]), "expected a number for '4': .*returned None of type NoneType, not a number: return one"),
        (naps, make_group(["4"]), "exceeded 0.5 s"),
    ],
)
async def test_a_breach_is_told(found: Any, group: Any, expected: str):
    with pytest.raises(AssertionError, match=expected):
        await check_reward(found, [group], deadline_s=0.5)


async def test_a_reward_that_need_not_repeat_itself_and_one_that_cannot_be_called():
    assert await check_reward(Counts, [make_group(["4", "5"])], repeats=False) == [[0.0, 1.0]]
    with pytest.raises(ExtensionError, match=r"cannot be called as lacks\(trajectory, fields\)"):
        await check_reward(lacks, [GROUP])
    with pytest.raises(ExtensionError, match="no module 'no_such_module'"):
        await check_reward("no_such_module:f", [GROUP])
    with pytest.raises(AssertionError, match="at least one group"):
        await check_reward(first_number, [])


def lacks(trajectory: Any) -> float:
    return 0.0
