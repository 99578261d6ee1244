"""A training hook by reference, in a form that travels to its process, and what it may return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verst.errors import CallFailed, ExtensionError
from verst.extend import check_class, described, is_async, load
from verst.protocols import TrainingHook

PREFIX = "custom/"
"""Of the metrics that hooks return, in the row of their step."""


@dataclass(frozen=True, slots=True)
class HookSpec:
    """`module:Class`, and the keyword arguments of the class."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"hook {self.name}"

    def open(self) -> Callable[[int, Mapping[str, float]], dict[str, float]]:
        """Makes the object; what it returns after a step is checked. Raises `ExtensionError` with the expected signature."""
        hook = open_hook(load(self.name, shipped={}, kind="hook"), self.title, self.options)
        return lambda step, metrics: metrics_of(hook.after_step(step, metrics))


def open_hook(found: Any, title: str, options: Mapping[str, Any]) -> TrainingHook:
    """The object that a class, or a function, makes. Raises `ExtensionError` with the expected signature."""
    check_class(found, "hook", TrainingHook, options)
    hook = found(**options)
    if not isinstance(hook, TrainingHook):
        raise ExtensionError(f"{title} made {hook!r}, which has no after_step; expected: def after_step(self, step, metrics)")
    if is_async(hook.after_step):
        raise ExtensionError(f"{title}: after_step is async; expected: def after_step(self, step, metrics)")
    return hook


def check_on_paper(found: Any, title: str, options: Mapping[str, Any]) -> None:
    """As `open_hook`, of what stands in for the class or function (`verst.on_paper`): what a function would make is not known."""
    if inspect.isclass(found):
        open_hook(found, title, options)
    else:
        check_class(found, "hook", TrainingHook, options)


def metrics_of(answer: Any) -> dict[str, float]:
    """What a hook returned, checked: metrics by name, or None for none. Raises `CallFailed`."""
    if answer is None:
        return {}
    if not isinstance(answer, Mapping):
        raise CallFailed(f"returned {described(answer)}: return {{name: number}}, or None")
    found: dict[str, float] = {}
    for name, value in answer.items():
        if not isinstance(name, str) or not name.strip():
            raise CallFailed(f"returned a metric of the name {str(name)[:60]!r}: give text")
        found[name] = _number(name, value)
    return found


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise CallFailed(f"returned {name}={described(value)}: give a number") from error
    if not math.isfinite(number):
        raise CallFailed(f"returned {name}={number}, which is not finite: leave it out of steps that have no value")
    return number


def check_hook(found: Any, rows: Sequence[Mapping[str, float]], **options: Any) -> list[dict[str, float]]:
    """The contract of a training hook (a class, as in `hooks.classes`), run on yours: `rows` are the metrics of steps 1, 2, and so on.

    The last step comes twice, as after a restart. Raises `ExtensionError` if its signature does not fit, `CallFailed` for an answer that is
    none, and whatever it raises itself. Returns its metrics of each step.
    """
    hook = open_hook(found, "hook", options)
    answers = [metrics_of(hook.after_step(step, dict(row))) for step, row in enumerate(rows, start=1)]
    if rows:
        metrics_of(hook.after_step(len(rows), dict(rows[-1])))
    return answers
