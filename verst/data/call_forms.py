"""How models write calls of tools: the forms that chat templates ask for, all between `<tool_call>` and `</tool_call>`.

Two of them have values without quotes. What such a value is, the tool's JSON Schema says: text, unless it declares other types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from verst.config.text import is_unicode

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAME = re.compile(r"\s*[^\s<{]+\s*")
_PAIR = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)

_WORDS = {"True": True, "False": False, "None": None}
"""Templates that write a value as Python does show these to the model, beside JSON's own."""

Tools = Sequence[Mapping[str, Any]]
"""Functions in OpenAI's form."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of any tool. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """What was meant as a call and is none: `reason` is said to the model."""

    reason: str


Named = tuple[str, dict[str, Any]]
"""A tool's name and its arguments."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """One form."""

    example: str
    named: Callable[[str, Tools], Named | Malformed]
    """Reads what stands between the marks; tools say which values are text."""
    body: Callable[[str, Mapping[str, Any]], str]
    """Writes it."""
    behind_text: str = "\n"
    """What the templates write between a message's words and its first call."""
    between: str = "\n"

    def read(self, body: str, tools: Tools = ()) -> ToolCall | Malformed:
        """The call whose text stands between the marks."""
        found = self.named(body, tools)
        if isinstance(found, Malformed):
            return found
        name, arguments = found
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e400 is read as an infinite number
        except (ValueError, RecursionError) as error:
            return Malformed(f"The arguments of {name[:80]!a} are not JSON ({error})")
        if not is_unicode(name + text):
            return Malformed(f"The call of {name[:80]!a} has half of a surrogate pair")
        return ToolCall(name, text)

    def write(self, words: str, calls: Sequence[ToolCall]) -> str:
        """A message that says something and calls tools. Templates of other models of the form may write other blanks between.

        Raises `RecursionError` for arguments that are nested too deeply.
        """
        made = (f"{OPEN}{self.body(call.name, json.loads(call.arguments))}{CLOSE}" for call in calls)
        return self.behind_text.join(part for part in (words, self.between.join(made)) if part)


def named_in_json(body: str, example: str) -> Named | Malformed:
    """The name and arguments in `{"name": …, "arguments": {…}}`; arguments may be JSON in a text. `example` is told to one that errs."""
    try:
        call = json.loads(body, parse_constant=no_constant)
        arguments = call.get("arguments") if isinstance(call, dict) else None
        arguments = json.loads(arguments, parse_constant=no_constant) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        return Malformed(f"The call is not valid JSON ({error}). Expected: {example}")
    if not isinstance(call, dict) or not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        return Malformed(f"The call is not of the expected form: {example}")
    return call["name"], arguments


def _json_body(name: str, arguments: Mapping[str, Any]) -> str:
    return f"\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n"


def _named_in_tags(body: str, tools: Tools) -> Named | Malformed:
    function = _FUNCTION.fullmatch(body)
    name = function[1].strip() if function else ""
    arguments = _pairs(_PARAMETER, function[2]) if function else None
    return _typed(name, arguments, tools) if name and arguments is not None else _strange(TAGS)


def _tags_body(name: str, arguments: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)

    values = "".join(f"<parameter={key}>\n{shown(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"\n<function={name}>\n{values}</function>\n"


def _named_in_pairs(body: str, tools: Tools) -> Named | Malformed:
    name, mark, rest = body.partition("<arg_key>")
    arguments = _pairs(_PAIR, mark + rest)
    return _typed(name.strip(), arguments, tools) if _NAME.fullmatch(name) and arguments is not None else _strange(PAIRS)


def _pairs_body(name: str, arguments: Mapping[str, Any], between: str) -> str:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    pairs = [f"<arg_key>{key}</arg_key>{between}<arg_value>{shown(value)}</arg_value>{between}" for key, value in arguments.items()]
    return f"{name}{between}{''.join(pairs)}"


def _pairs(pattern: re.Pattern[str], text: str) -> dict[str, str] | None:
    """Values by their keys; None if there is something else in the text. What is given twice is what it is given last, as in JSON."""
    found: dict[str, str] = {}
    place = 0
    while match := pattern.match(text, place):
        found[match[1].strip()], place = match[2], match.end()
    return None if text[place:].strip() else found


def _typed(name: str, arguments: Mapping[str, str], tools: Tools) -> Named | Malformed:
    """With values as the tool's schema declares them."""
    declared = _properties(name, tools)
    typed: dict[str, Any] = {}
    for key, text in arguments.items():
        types = _types(declared.get(key))
        try:
            typed[key] = _value(text, types)
        except (ValueError, RecursionError) as error:
            wanted = " or ".join(sorted(types))[:80]
            return Malformed(f"{key[:80]} of {name[:80]} is to be {wanted}, and is not ({error}): {text[:80]}")
    return name, typed


def _value(text: str, types: frozenset[str]) -> Any:
    if "null" in types and text in ("null", "None"):
        return None
    if not types or "string" in types:
        return text
    word = text.strip()
    return _WORDS[word] if word in _WORDS else json.loads(text, parse_constant=no_constant)


def _properties(name: str, tools: Tools) -> Mapping[str, Any]:
    """The schemas of a tool's parameters. Whoever made the tools may have written anything there."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            declared = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return declared if isinstance(declared, Mapping) else {}
    return {}


def _types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows, by its `type` and those of its alternatives; none if it declares none.

    An alternative that declares none, such as a reference, may be text.
    """
    if not isinstance(schema, Mapping):
        return frozenset()
    found = _declared(schema)
    for name in ("anyOf", "oneOf"):
        alternatives = schema.get(name)
        for one in alternatives if isinstance(alternatives, list) else []:
            found |= (_declared(one) if isinstance(one, Mapping) else frozenset()) or {"string"}
    return found


def _declared(schema: Mapping[str, Any]) -> frozenset[str]:
    kinds = schema.get("type")
    return frozenset(kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str))


def _strange(form: CallForm) -> Malformed:
    return Malformed(f"The call is not of the expected form: {form.example}")


def no_constant(name: str) -> NoReturn:
    """For `parse_constant`: Python reads NaN and Infinity."""
    raise ValueError(f"{name} is no JSON")


_JSON_EXAMPLE = '{"name": "…", "arguments": {…}}'
_PAIRS_EXAMPLE = "NAME <arg_key>PARAMETER</arg_key><arg_value>VALUE</arg_value>…"

JSON = CallForm(_JSON_EXAMPLE, lambda body, tools: named_in_json(body, _JSON_EXAMPLE), _json_body)
"""Of Hermes, Qwen 2.5 and Qwen 3."""
TAGS = CallForm("<function=NAME><parameter=PARAMETER>VALUE</parameter>…</function>", _named_in_tags, _tags_body, behind_text="\n\n")
"""Of Qwen3-Coder and Qwen 3.5."""
PAIRS = CallForm(_PAIRS_EXAMPLE, _named_in_pairs, partial(_pairs_body, between=""), behind_text="", between="")
"""Of GLM-4.7 and later."""
PAIRS_ON_LINES = CallForm(_PAIRS_EXAMPLE, _named_in_pairs, partial(_pairs_body, between="\n"))
"""Of GLM-4.5 and GLM-4.6."""


def asked_for(told: str) -> CallForm | None:
    """The form that a template asks for, by what it tells a model of tools. None: of no form that is known here."""
    if OPEN not in told or CLOSE not in told or "<tool_calls>" in told:
        return None
    if "<function=" in told or "<arg_key>" in told:
        if "<parameter=" in told:
            return TAGS
        lines = "</arg_key>\n<arg_value>" in told
        return (PAIRS_ON_LINES if lines else PAIRS) if "<arg_value>" in told else None
    return JSON if '"arguments"' in told else None
