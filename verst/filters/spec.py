"""A filter by reference, in a form that travels to its process, and what it says of a group."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verst.errors import CallFailed, ExtensionError
from verst.extend import described, is_async, load, made
from verst.filters.shipped import SHIPPED
from verst.types import Group

Verdict = str | dict[str, str] | None
"""As a filter's answer travels, in JSON values: members are text."""


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """A shipped name or `module:name`, and its keyword arguments."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"filter {self.name}"

    def build(self) -> Callable[[Group], Any]:
        """The filter. A class is made once, with the options; a function gets them in each call.

        Raises `ExtensionError` if it cannot be found, or its signature does not fit; `ConfigError` for options of a shipped one.
        """
        return check_filter_call(load(self.name, shipped=SHIPPED, kind="filter"), self.options)

    def open(self) -> Callable[[Group], Verdict]:
        """As `build`, and what it answers is checked."""
        function = self.build()
        return lambda group: verdict_of(function(group), group)


def check_filter_call(found: Any, options: Mapping[str, Any]) -> Callable[[Group], Any]:
    """The filter that `found` is or makes. Raises `ExtensionError` with the expected signature."""
    function = made(found, "filter", ("group",), options)
    if is_async(found) or is_async(function):
        raise ExtensionError(f"filter {found!r} is async: write a plain `def` (group) -> None, a reason, or {{member: reason}}")
    return function


def verdict_of(answer: Any, group: Group) -> Verdict:
    """A filter's answer, checked: None keeps the group, text drops it, a mapping leaves out members. Raises `CallFailed`."""
    if answer is None or (isinstance(answer, str) and answer.strip()):
        return answer
    if isinstance(answer, Mapping):
        return {str(_member(member, group)): _reason(reason) for member, reason in answer.items()}
    raise CallFailed(f"returned {described(answer)}: return None, the reason to drop the group, or {{member: reason to leave it out}}")


def _member(member: Any, group: Group) -> int:
    try:
        index = -1 if isinstance(member, bool) else operator.index(member)  # NumPy's integers are indices, its bool is none
    except TypeError:
        index = -1
    if not 0 <= index < len(group.trajectories):
        raise CallFailed(f"leaves out member {described(member)}: give an index of group.trajectories, 0 to {len(group.trajectories) - 1}")
    return index


def _reason(reason: Any) -> str:
    if not isinstance(reason, str) or not reason.strip():
        raise CallFailed(f"leaves out a member for {described(reason)}: give the reason as text, which goes on record")
    return reason
