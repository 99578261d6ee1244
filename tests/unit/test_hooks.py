"""Training hooks: what they may return, and that one which fails costs its own metrics and no more."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from verst.config.schema import HooksConfig
from verst.errors import CallFailed, ExtensionError
from verst.hooks import HookSpec, metrics_of
from verst.observe.spans import Spans
from verst.runtime.hooks import Hooks
from verst.testing import check_hook

EXAMPLES = Path(__file__).parents[2] / "examples/extensions"
HOOKS = """
import os, time

class Steps:
    def __init__(self, name="steps"): self.name, self.seen = name, 0
    def after_step(self, step, metrics):
        self.seen += 1
        return {self.name: self.seen, "reward": metrics["reward"] + 1, "secret": "MY_API_KEY" in os.environ}

class Raises:
    def after_step(self, step, metrics): raise ValueError("no disk")

class Sleeps:
    def after_step(self, step, metrics): time.sleep(60)

class Leaves:
    def after_step(self, step, metrics): os._exit(3)

class Short:
    def after_step(self, step): ...

class Waits:
    async def after_step(self, step, metrics): ...

class Nothing: ...

def maker(): return Nothing()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "user_hooks.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    yield "user_hooks"
    sys.modules.pop("user_hooks", None)


async def steps(tmp_path: Path, *names: str, count: int = 2, **options: Any) -> tuple[list[dict[str, float]], list[str], float]:
    """The metrics of some steps, the warnings, and the longest time that a step was held."""
    warnings: list[str] = []
    hooks = Hooks(HooksConfig(classes={f"user_hooks:{name}": {} for name in names}, **options), tmp_path, warnings.append)
    await hooks.start()
    held, found = 0.0, []
    try:
        for step in range(1, count + 1):
            began = time.perf_counter()
            found.append(await hooks.after_step(step, {"reward": float(step)}, Spans()))
            held = max(held, time.perf_counter() - began)
            hooks.check()
    finally:
        hooks.close()
    return found, warnings, held


@pytest.mark.usefixtures("module")
async def test_metrics_join_those_of_the_step_and_the_object_lives_through_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "hidden")
    found, warnings, _ = await steps(tmp_path, "Steps")
    rest = {"custom/secret": 0.0, "hooks/failed": 0.0, "hooks/active": 1.0}
    assert found == [{"custom/steps": 1.0, "custom/reward": 2.0, **rest}, {"custom/steps": 2.0, "custom/reward": 3.0, **rest}]
    assert warnings == []


@pytest.mark.usefixtures("module")
async def test_a_hook_that_raises_is_told_once_and_asked_again(tmp_path: Path):
    found, warnings, _ = await steps(tmp_path, "Raises", "Steps")
    assert [(row["hooks/failed"], row["hooks/active"], row["custom/steps"]) for row in found] == [(1, 2, 1), (1, 2, 2)]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: after step 1: hook user_hooks:Raises raised ValueError: no disk (")


@pytest.mark.usefixtures("module")
async def test_hooks_that_lose_their_process_are_given_up_and_hold_no_step_longer_than_one_deadline(tmp_path: Path):
    found, warnings, held = await steps(tmp_path, "Sleeps", "Leaves", "Steps", deadline_s=1.0)
    assert [(row["hooks/failed"], row["hooks/active"], row["custom/steps"]) for row in found] == [(2, 1, 1), (0, 1, 2)]
    assert warnings[0] == (
        "warning: after step 1: hook user_hooks:Sleeps exceeded 1 s: make it faster, or raise hooks.deadline_s; it is given up until the "
        "run is started again"
    )
    assert "hook user_hooks:Leaves: its process ended with exit code 3" in warnings[1]
    assert held < 5


@pytest.mark.usefixtures("module")
async def test_a_required_hook_that_fails_is_an_error(tmp_path: Path):
    with pytest.raises(CallFailed, match=r"after step 1: hook user_hooks:Raises raised .* \(hooks.required ends the run\)"):
        await steps(tmp_path, "Raises", required=True)


async def test_without_hooks_there_is_nothing_to_report(tmp_path: Path):
    spans = Spans()
    assert await Hooks(HooksConfig(), tmp_path, pytest.fail).after_step(1, {}, spans) == {}
    assert spans.phases == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Short", r"after_step\(self, step\) does not fit: too many positional arguments; expected: def after_step\(self, step"),
        ("Nothing", r"has no method 'after_step'; expected: def after_step"),
        ("maker", r"made <.*Nothing object.*>, which has no after_step; expected: def after_step"),
        ("Waits", r"after_step is async; expected: def after_step"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_hook_that_does_not_fit_is_shown_what_would(name: str, words: str):
    with pytest.raises(ExtensionError, match=words):
        HookSpec(f"user_hooks:{name}").open()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (3, "returned 3 of type int: return {name: number}, or None"),
        ({"a": "x"}, "returned a='x' of type str: give a number"),
        ({"a": float("nan")}, "returned a=nan, which is not finite"),
        ({3: 1.0}, "a metric of the name '3': give text"),
    ],
)
def test_metrics_that_are_none_are_refused(answer: Any, words: str):
    with pytest.raises(CallFailed, match=words):
        metrics_of(answer)


def test_the_example_keeps_the_contract(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from smoothed import Smoothed  # pyright: ignore[reportMissingImports]

    assert check_hook(Smoothed, [{"reward": 1.0}, {}, {"reward": 2.0}], weight=0.5) == [
        {"smoothed/reward": 1.0},
        {},
        {"smoothed/reward": 1.5},
    ]
