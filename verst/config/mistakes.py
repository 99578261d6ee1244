"""What pydantic finds wrong with a run file, in words for a person: the option, its place, and what would be valid."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from verst.config.algorithms import PRESETS, CorrectionConfig
from verst.config.schema import Config, EvalSetConfig

_SHOWN = 60  # characters of a wrong value
_MAPPINGS = ("options", "environment_options", "sglang", "megatron")
"""Options that have options of their own."""
_SETS = ["eval", "sets"]
"""Sections by names of the user's own."""
_SECTION = "expected a section, with its options indented below it; leave it out to have all of them at their defaults"
_WHOLE, _NUMBER, _TEXT = "expected a whole number, such as 8", "expected a number, such as 0.5", "expected text"
_QUOTED = "expected text: put quotes around it"
_EXPECTED = {
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": "expected a mapping, such as {{name: value}}",
    "list_type": "expected a list, such as [a, b]",
    "tuple_type": "expected a list, such as [a, b]",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "the number is too large",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": _QUOTED,
    "string_sub_type": _TEXT,
    "string_unicode": "expected text in UTF-8",
    "string_too_short": "expected text that is not empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "may have letters, digits, '.', '_' and '-', and begins with a letter or a digit",
    "too_short": "expected {min_length} values or more",
    "too_long": "expected {max_length} values, not {actual_length}",
    "literal_error": "expected {expected}",
    "recursion_loop": "contains itself: write the value out",
    "invalid-json-value": "expected text, a number, true, false, null, a list or a mapping; put a date into quotes",
    "invalid_key": "a key is not text: put it in quotes",
}
"""By pydantic's type of error, formatted with its context."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where each key was set: `source` as a whole, and by key a line of it or an override."""

    source: str
    known: Mapping[tuple[str, ...], str]

    def overridden(self, key: tuple[str, ...], override: str) -> Places:
        """The same after `override` has set `key`."""
        kept = {k: place for k, place in self.known.items() if k[: len(key)] != key}
        return Places(self.source, kept | {key: f"override {_clipped(override)!r}"})

    def of(self, key: tuple[str, ...]) -> str:
        """Of the key, else of the nearest section around it."""
        around = (key[:length] for length in range(len(key), 0, -1))
        return next((self.known[k] for k in around if k in self.known), self.source)


def explain(invalid: ValidationError, places: Places) -> str:
    """Everything that is wrong, one line each, every line with its place."""
    problems: list[str] = []
    options: dict[tuple[str, str], list[ErrorDetails]] = {}  # several errors of one: none of the types it may have fits
    for error in invalid.errors(include_url=False):
        if error["loc"]:
            options.setdefault((".".join(_key(error["loc"])), _in_list(error["loc"])), []).append(error)
        else:  # rules between options: several, each of which begins with the option it is about
            rules = error["msg"].removeprefix("Value error, ").splitlines()
            problems += [f"{places.of(tuple(rule.split(' ', 1)[0].split('.')))}: {rule}" for rule in rules]
    for (_, within), errors in options.items():
        key = _key(errors[0]["loc"])
        if errors[0]["type"] == "union_tag_invalid":
            key = (*key, "name")
        problems.append(f"{places.of(key)}: {_problem(errors, key, within)}")
    return "\n".join(problems)


def known_options(model: type[BaseModel], prefix: tuple[str, ...], algorithm: str) -> list[tuple[str, ...]]:
    """Every section and option below `model`, by key."""
    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        key = (*prefix, name)
        found.append(key)
        inner = PRESETS[algorithm] if name == "algorithm" else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += known_options(inner, key, algorithm)
    return found


def _key(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """The option's key in the file. pydantic adds the algorithm's name ("algorithm", "grpo", "clip"), and what lies below an option."""
    parts = [str(p) for p in itertools.takewhile(lambda p: isinstance(p, str), loc)]
    if parts[0] == "algorithm" and parts[1:] and parts[1] in PRESETS:
        del parts[1]
    if parts[:2] == _SETS:
        return tuple(part for part in parts[:4] if part != "[key]")  # pydantic's word for a name that is wrong itself
    return tuple(parts[: 3 if parts[1:2] and parts[1] in _MAPPINGS else 2])


def _in_list(loc: tuple[int | str, ...]) -> str:
    """Where an option of a list's sections lies in the list: " number 2: upper"; empty elsewhere."""
    within = next((i for i, part in enumerate(loc) if isinstance(part, int)), len(loc))
    return f" number {int(loc[within]) + 1}: {loc[within + 1]}" if within + 1 < len(loc) else ""


def _problem(errors: Sequence[ErrorDetails], key: tuple[str, ...], within: str) -> str:
    error = errors[0]
    dotted = ".".join(map(_named, key)) + within
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown option {dotted}{_suggestion(error, key)}"
    if kind == "missing":
        return _missing(error, dotted)
    if kind == "union_tag_invalid":
        return f"{dotted}: {_value(error['input'].get('name'))} is not an algorithm; there are: {', '.join(PRESETS)}"
    if kind == "union_tag_not_found":
        return f"{dotted}.name is required: one of {', '.join(PRESETS)}"
    expected = ", or ".join(dict.fromkeys(map(_expected, errors)))
    return f"{dotted}: {expected} (got {_value(error['input'])})"


def _missing(error: ErrorDetails, dotted: str) -> str:
    if isinstance(error["loc"][-1], int):
        return f"{dotted}: a value is missing: expected {int(error['loc'][-1]) + 1} values"
    section = Config.model_fields.get(dotted)
    if section is None or not isinstance(section.annotation, type):
        return f"{dotted} is required: set it in the run file, or with {dotted}=VALUE on the command line"
    needed = [f"{dotted}.{name}" for name, field in section.annotation.model_fields.items() if field.is_required()]
    return f"{dotted} is required: add the section, with {' and '.join(needed)}"


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] not in _EXPECTED:
        return error["msg"]
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    return _EXPECTED[error["type"]].format(**context)


def _value(value: Any) -> str:
    try:
        return _clipped(repr(value))
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__} that is too large to show"


def _named(part: str) -> str:
    return _clipped(part if part.isprintable() else repr(part)[1:-1])


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _suggestion(error: ErrorDetails, key: tuple[str, ...]) -> str:
    """The nearest valid name in the same section, else the same name in another section, else the section's names."""
    algorithm = next((str(p) for p in error["loc"] if p in PRESETS), "grpo")
    if _in_list(error["loc"]):  # the one option that is a list of sections
        return f"; valid here: {', '.join(CorrectionConfig.model_fields)}"
    if list(key[:2]) == _SETS:
        return _among(key, list(EvalSetConfig.model_fields))
    owners = [name for name, options in PRESETS.items() if key[0] == "algorithm" and key[-1] in options.model_fields]
    if owners:
        return f", which {algorithm} does not have; it is an option of: {', '.join(owners)}"
    known = known_options(Config, (), algorithm)
    siblings = [k[-1] for k in known if k[:-1] == key[:-1]]
    elsewhere = [".".join(k) for k in known if k[-1] == key[-1]]
    if elsewhere and not _near(key, siblings):
        return f"; did you mean {elsewhere[0]}?"
    return _among(key, siblings)


def _near(key: tuple[str, ...], siblings: list[str]) -> list[str]:
    return difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.6)


def _among(key: tuple[str, ...], siblings: list[str]) -> str:
    near = _near(key, siblings)
    if near:
        return f"; did you mean {'.'.join((*key[:-1], near[0]))}?"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""
