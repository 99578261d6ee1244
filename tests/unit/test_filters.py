"""Filters: what the shipped ones say, what a user's may say, and what becomes of a group whose filter fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import lives
from verst.config.schema import FiltersConfig
from verst.errors import CallFailed, ConfigError, ExtensionError
from verst.filters.shipped import Duplicates, Length
from verst.filters.spec import FilterSpec, verdict_of
from verst.runtime.filtering import LOG, Filters, Judged, without
from verst.testing import check_filter, make_group
from verst.types import Status

EXAMPLES = Path(__file__).parents[2] / "examples/extensions"
FILTERS = """
import os, time

def by_text(group, say="no"):
    text = group.trajectories[0].completion
    print("asked about", text)
    if text == "raise": raise ValueError("no such group")
    if text == "sleep": time.sleep(60)
    if text == "exit": os._exit(3)
    if text == "number": return 3
    if text == "drop": return say
    if text == "secret": return str("MY_API_KEY" in os.environ)
    if text == "pid": return str(os.getpid())
    if text == "first": return {0: "is the first"}

def last(group):
    return {group.trajectories.index(group.trainable[-1]): "is the last"}

def lonely(group):
    return None if len(group.trainable) > 1 else f"only {len(group.trainable)} left"

def wrong(group, fields): ...

async def waits(group): ...

class Counts:
    def __init__(self): self.asked = 0
    def __call__(self, group):
        self.asked += 1
        return "too many" if self.asked > 1 else None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "user_filters.py").write_text(FILTERS)
    monkeypatch.chdir(tmp_path)
    yield "user_filters"
    sys.modules.pop("user_filters", None)


async def judge(tmp_path: Path, functions: dict[str, dict[str, Any]], *texts: str, deadline_s: float = 10.0) -> tuple[list[Judged], Any]:
    """What filters say of groups whose first completions are `texts`, and their metrics."""
    filters = Filters(FiltersConfig(functions=functions, deadline_s=deadline_s), tmp_path)
    await filters.start()
    try:
        return [await filters.judge(make_group([text, "b", "c"])) for text in texts], filters.report()
    finally:
        filters.close()


def test_length_leaves_out_what_is_outside_its_bounds():
    assert Length(2, 3)(make_group(["a", "ab", "abc", "abcd"])) == {0: "fewer than 2 tokens", 3: "more than 3 tokens"}
    assert Length(max_tokens=1)(make_group(["a"])) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "it has no bound"),
        ({"min_tokens": 3, "max_tokens": 2}, r"min_tokens \(3\) is above max_tokens \(2\)"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": "many"}, "min_tokens is 'many'"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        FilterSpec("length", options).build()


@pytest.mark.parametrize(
    ("texts", "limit", "dropped"), [("aaab", 0.5, False), ("aaaa", 0.5, True), ("abcd", 0.0, False), ("aabc", 0.0, True)]
)
def test_duplicates_drops_a_group_by_its_share_of_copies(texts: str, limit: float, dropped: bool):
    assert (Duplicates(limit)(make_group(list(texts))) is not None) == dropped


@pytest.mark.parametrize("limit", [1, -0.1, "half", True])
def test_a_share_that_is_none_is_refused(limit: Any):
    with pytest.raises(ConfigError, match="give a share from 0 to below 1"):
        Duplicates(limit)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (True, "returned True of type bool: return None, the reason"),
        ("", "returned '' of type str"),
        ({2: "x"}, r"member 2 of type int: give an index of group.trajectories, 0 to 1"),
        ({True: "x"}, "member True of type bool"),
        ({np.True_: "x"}, r"member np\.True_ of type bool"),
        ({np.int64(-1): "x"}, r"member np\.int64\(-1\) of type int64"),
        ({0.0: "x"}, "member 0.0 of type float"),
        ({"0": "x"}, "member '0' of type str"),
        ({0: None}, "for None of type NoneType: give the reason as text"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer: Any, words: str):
    with pytest.raises(CallFailed, match=words):
        verdict_of(answer, make_group(["a", "b"]))


def test_members_may_be_numpys_integers():
    verdict = verdict_of(dict.fromkeys(np.flatnonzero([True, False, True]), "bad"), make_group(["a", "b", "c"]))
    assert verdict == {"0": "bad", "2": "bad"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lenght", {}, r"filter 'lenght' is not shipped with Verst; nearest: length \(shipped: duplicates, length\)"),
        ("user_filters:wrong", {}, r"wrong\(group, fields\) in .* cannot be called as wrong\(group\)"),
        ("user_filters:by_text", {"sya": "x"}, "nearest: say"),
        ("user_filters:waits", {}, "is async: write a plain `def`"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_filter_that_does_not_fit_is_shown_what_would(name: str, options: dict[str, Any], words: str):
    with pytest.raises(ExtensionError, match=words):
        FilterSpec(name, options).build()


async def test_what_a_filter_says_and_what_it_does_wrong_are_the_groups_alone(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "hidden")
    name = f"{module}:by_text"
    texts = ("keep", "drop", "first", "raise", "number", "exit", "secret")
    found, counted = await judge(tmp_path, {name: {"say": "not this"}}, *texts)
    keep, drop, first, raises, number, leaves, secret = found
    assert keep == Judged()
    assert drop == Judged(dropped=f"filter {name}: not this")
    assert first == Judged({0: f"filter {name}: is the first"})
    assert raises.failed is not None
    assert raises.failed.startswith(f"filter {name} raised ValueError: no such group (")
    assert number.failed is not None
    assert "returned 3 of type int" in number.failed
    assert leaves.failed == f"filter {name}: its process ended with exit code 3; what it printed is in {tmp_path / LOG}"
    assert secret.dropped == f"filter {name}: False"
    assert counted == {"filters/dropped": 2, "filters/failed": 3, "filters/left_out": 1}
    assert "asked about keep" in (tmp_path / LOG).read_text()


async def test_a_filter_that_takes_too_long_is_started_anew(tmp_path: Path, module: str):
    name = f"{module}:by_text"
    found, counted = await judge(tmp_path, {name: {}}, "sleep", "keep", deadline_s=1.0)
    assert found == [Judged(failed=f"filter {name} exceeded 1 s: make it faster, or raise filters.deadline_s"), Judged()]
    assert counted["filters/failed"] == 1


async def test_nothing_is_left_of_a_filters_process(tmp_path: Path, module: str):
    (found,), _ = await judge(tmp_path, {f"{module}:by_text": {}}, "pid")
    assert found.dropped is not None
    assert not lives(int(found.dropped.split()[-1]))


async def test_each_filter_sees_what_those_before_it_left(tmp_path: Path, module: str):
    functions: dict[str, dict[str, Any]] = {f"{module}:by_text": {}, f"{module}:last": {}, f"{module}:lonely": {}}
    (found,), _ = await judge(tmp_path, functions, "first")
    assert found == Judged(dropped=f"filter {module}:lonely: only 1 left")


async def test_without_filters_there_is_nothing_to_count(tmp_path: Path):
    assert await judge(tmp_path, {}, "a") == ([Judged()], {})


async def test_a_filter_that_cannot_be_loaded_ends_the_start(tmp_path: Path, module: str):
    filters = Filters(FiltersConfig(functions={f"{module}:missing": {}}), tmp_path)
    with pytest.raises(ExtensionError, match="has no 'missing'"):
        await filters.start()


def test_what_is_left_out_is_kept_and_not_trained():
    left = without(make_group(["a", "b"]), {1: "filter f: is short"})
    assert [t.status for t in left.trajectories] == [Status.FINISHED, Status.FAILED]
    assert left.trajectories[1].error == "left out by filter f: is short"


def test_the_contract_of_a_filter(module: str):
    load = FilterSpec(f"{module}:by_text").build()
    assert check_filter(load, [make_group(["drop"]), make_group(["first"], seq=1)]) == ["no", {"0": "is the first"}]
    counts = FilterSpec(f"{module}:Counts").build()
    with pytest.raises(AssertionError, match="group 1 was answered too many, and when it was asked about again None"):
        check_filter(type(counts), [make_group(["a"]), make_group(["a"], seq=1)])


def test_the_contract_notices_a_group_that_is_changed():
    def spoils(group: Any) -> None:
        group.trajectories[0].tokens_T[:] = 0

    with pytest.raises(AssertionError, match=r"the filter changed groups \[0\]"):
        check_filter(spoils, [make_group(["a"])])


def test_the_example(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from refusals import refusals  # pyright: ignore[reportMissingImports]

    groups = [make_group(["I cannot", "4", "5"]), make_group(["I cannot", "I'm sorry", "5"], seq=1)]
    assert check_filter(refusals, groups, share=0.5) == [{"0": "refuses"}, "most answers refuse"]
