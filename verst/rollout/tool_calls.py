"""Finds the call of the Python tool in what a model wrote: a fenced block, or the form of Qwen and Hermes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_OPENS = re.compile(r"```(?:python|py)\b[ \t]*(?P<line>\r?\n)?|(?P<tag><tool_call>)")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_FORM = '{"name": "python", "arguments": {"code": "…"}}'


@dataclass(frozen=True, slots=True)
class Call:
    """The first call of a completion. `more`: others follow."""

    code: str
    more: bool


@dataclass(frozen=True, slots=True)
class Malformed:
    """What was meant as a call and is none: `reason` is said to the model."""

    reason: str


def first_call(text: str) -> Call | Malformed | None:
    """The first call; None if there is nothing that looks like one.

    Calls are ```python blocks and `<tool_call>{"name": "python", "arguments": {"code": …}}</tool_call>`; `arguments` may be JSON in a text.
    """
    opened = _OPENS.search(text)
    if opened is None:
        return None
    if opened["tag"]:
        body, closed, rest = text[opened.end() :].partition("</tool_call>")
        found = _code(body) if closed else Malformed("The call has no </tool_call>: write one after its JSON.")
    else:
        if not opened["line"]:
            return Malformed("The code begins on the line after ```python.")
        close = _FENCE.search(text, opened.end())
        if close is None:
            return Malformed("The block ```python is not closed: write ``` on a line of its own after the code.")
        found, rest = text[opened.end() : close.start()], text[close.end() :]
    return found if isinstance(found, Malformed) else Call(found, _OPENS.search(rest) is not None)


def _code(body: str) -> str | Malformed:
    try:
        call = json.loads(body)
        arguments = call.get("arguments") if isinstance(call, dict) else None
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        return Malformed(f"The call is not valid JSON ({error}). Expected: {_FORM}")
    if not isinstance(call, dict) or not isinstance(arguments, dict) or "name" not in call:
        return Malformed(f"The call is not of the expected form: {_FORM}")
    if call["name"] != "python":
        return Malformed(f"There is no tool {str(call['name'])[:80]!r}, only python. Expected: {_FORM}")
    if not isinstance(arguments.get("code"), str):
        return Malformed(f"The arguments have no text under code. Expected: {_FORM}")
    return arguments["code"]
