"""Finds tool calls in what a model wrote: in the form that its template asks for and, for the Python tool, fenced blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from verst.data.call_forms import CLOSE, JSON, OPEN, CallForm, Malformed, ToolCall, Tools, named_in_json

_OPENS = re.compile(r"```(?:python|py)\b[ \t]*(?P<line>\r?\n)?|(?P<tag><tool_call>)")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_FORM = '{"name": "python", "arguments": {"code": "…"}}'
_NO_CLOSE = "The call has no </tool_call>: write one at its end."


@dataclass(frozen=True, slots=True)
class Call:
    """The first call of a completion. `more`: others follow."""

    code: str
    more: bool


def first_call(text: str) -> Call | Malformed | None:
    """The first call; None if there is nothing that looks like one.

    Calls are ```python blocks and `<tool_call>{"name": "python", "arguments": {"code": …}}</tool_call>`; `arguments` may be JSON in a text.
    """
    opened = _OPENS.search(text)
    if opened is None:
        return None
    if opened["tag"]:
        body, closed, rest = text[opened.end() :].partition(CLOSE)
        found = _code(body) if closed else Malformed(_NO_CLOSE)
    else:
        if not opened["line"]:
            return Malformed("The code begins on the line after ```python.")
        close = _FENCE.search(text, opened.end())
        if close is None:
            return Malformed("The block ```python is not closed: write ``` on a line of its own after the code.")
        found, rest = text[opened.end() : close.start()], text[close.end() :]
    return found if isinstance(found, Malformed) else Call(found, _OPENS.search(rest) is not None)


def split_calls(text: str, form: CallForm = JSON, tools: Tools = ()) -> tuple[str, tuple[ToolCall, ...]] | Malformed:
    """A completion as what it says and the calls it makes, each between `<tool_call>` and `</tool_call>`.

    `form`: what the model's template asks for (`ChatRenderer.call_form`), by default `{"name": …, "arguments": {…}}`. `tools`: what can be
    called, in OpenAI's form; forms without quotes need their schemas to tell a number from its text.

    What is thought before `</think>` calls nothing. Where one call is malformed none is made: the rest may have relied on it.
    """
    thought, ended, rest = text.rpartition("</think>")
    said, calls = [thought + ended], []
    while OPEN in rest:
        before, _, rest = rest.partition(OPEN)
        body, closed, rest = rest.partition(CLOSE)
        if not closed:
            return Malformed(_NO_CLOSE)
        found = form.read(body, tools)
        if isinstance(found, Malformed):
            return found
        said.append(before)
        calls.append(found)
    return ("".join((*said, rest)).strip() if calls else text), tuple(calls)


def _code(body: str) -> str | Malformed:
    found = named_in_json(body, _FORM)
    if isinstance(found, Malformed):
        return found
    name, arguments = found
    if name != "python":
        return Malformed(f"There is no tool {name[:80]!r}, only python. Expected: {_FORM}")
    code = arguments.get("code")
    return code if isinstance(code, str) else Malformed(f"The arguments have no text under code. Expected: {_FORM}")
