"""Finds tool calls in what a model wrote: the JSON form of Qwen and Hermes and, for the Python tool, fenced blocks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn

_OPENS = re.compile(r"```(?:python|py)\b[ \t]*(?P<line>\r?\n)?|(?P<tag><tool_call>)")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_FORM = '{"name": "python", "arguments": {"code": "…"}}'
_ANY_FORM = '{"name": "…", "arguments": {…}}'
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NO_CLOSE = "The call has no </tool_call>: write one after its JSON."


@dataclass(frozen=True, slots=True)
class Call:
    """The first call of a completion. `more`: others follow."""

    code: str
    more: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of any tool. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


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
        body, closed, rest = text[opened.end() :].partition(_CLOSE)
        found = _code(body) if closed else Malformed(_NO_CLOSE)
    else:
        if not opened["line"]:
            return Malformed("The code begins on the line after ```python.")
        close = _FENCE.search(text, opened.end())
        if close is None:
            return Malformed("The block ```python is not closed: write ``` on a line of its own after the code.")
        found, rest = text[opened.end() : close.start()], text[close.end() :]
    return found if isinstance(found, Malformed) else Call(found, _OPENS.search(rest) is not None)


def split_calls(text: str) -> tuple[str, tuple[ToolCall, ...]] | Malformed:
    """A completion as what it says and the calls it makes, `<tool_call>{"name": …, "arguments": {…}}</tool_call>` each.

    What is thought before `</think>` calls nothing. Where one call is malformed none is made: the rest may have relied on it.
    """
    thought, ended, rest = text.rpartition("</think>")
    said, calls = [thought + ended], []
    while _OPEN in rest:
        before, _, rest = rest.partition(_OPEN)
        body, closed, rest = rest.partition(_CLOSE)
        if not closed:
            return Malformed(_NO_CLOSE)
        found = _named(body, _ANY_FORM)
        if isinstance(found, Malformed):
            return found
        name, arguments = found
        said.append(before)
        calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
    return ("".join((*said, rest)).strip() if calls else text), tuple(calls)


def _named(body: str, form: str) -> tuple[str, dict[str, object]] | Malformed:
    try:
        call = json.loads(body, parse_constant=_no_constant)
        arguments = call.get("arguments") if isinstance(call, dict) else None
        arguments = json.loads(arguments, parse_constant=_no_constant) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        return Malformed(f"The call is not valid JSON ({error}). Expected: {form}")
    if not isinstance(call, dict) or not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        return Malformed(f"The call is not of the expected form: {form}")
    return call["name"], arguments


def _code(body: str) -> str | Malformed:
    found = _named(body, _FORM)
    if isinstance(found, Malformed):
        return found
    name, arguments = found
    if name != "python":
        return Malformed(f"There is no tool {name[:80]!r}, only python. Expected: {_FORM}")
    code = arguments.get("code")
    return code if isinstance(code, str) else Malformed(f"The arguments have no text under code. Expected: {_FORM}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
