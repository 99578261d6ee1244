"""The run file described for editors and for people, both read from the schema: a JSON schema, and the page `docs/configuration.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from verst.config.checks import inapplicable
from verst.config.schema import Config

_KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_ANY_VALUE = "JsonValue"  # pydantic's name for what options of other code may be
_LARGEST = 2**31 - 1  # of every whole number; said once, at the top of the page
_RUNS: tuple[Mapping[str, Any], ...] = (
    {},
    {"algorithm": {"name": "sft"}},
    {"algorithm": {"name": "distill", "teacher": "teacher"}},
    {"tracking": {"trackers": []}},
)
"""Runs in which, between them, every option that can be without effect is without effect, for each of the reasons there are."""

_INTRODUCTION = """\
# Configuration

Every option of a run file. This page is made from the schema: `verst schema --markdown` prints it.

A run file is YAML with the sections below; `run.steps` and `model.path` are required. `verst train FILE a.b=c` replaces a value, `a.b=null`
takes it back to its default. Unknown and repeated names are errors with the line and the nearest valid name, and so is an option that the
run would never read (why is said below each table), unless the part that reads it is switched off by name (`eval.every_steps=0`).
`verst check FILE` prints what a file resolves to. Whole numbers go up to 2³¹ − 1, and no number is infinite.

Options marked ↻ may be changed by `verst resume RUN a.b=c`; the others stay as they were when the run began. `run.steps` can be changed
while `train.schedule` is `constant`. Of `train.megatron`, the parallel sizes can be changed.

## In an editor

`verst schema` prints a JSON schema. With it, editors that have the YAML language server (VS Code: the extension YAML by Red Hat) complete
names and values, show what an option does, and mark mistakes as they are typed:

```
verst schema > verst.schema.json
```

and, as the first line of a run file beside it:

```yaml
# yaml-language-server: $schema=verst.schema.json
```

The schema knows each option by itself. How options go together only `verst check` knows.
"""


def json_schema() -> dict[str, Any]:
    """What a run file may hold, as a JSON schema (draft 2020-12). Rules between options are not in it."""
    schema = _standard(Config.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Run file of Verst"}


def markdown(changeable: Container[str]) -> str:
    """The reference of all options. `changeable`: dotted names that a resumed run may have otherwise."""
    schema = json_schema()
    unread = _unread()
    parts = [_INTRODUCTION]
    for name, section in schema["properties"].items():
        if "oneOf" in section:
            presets = [schema["$defs"][_referred(reference)] for reference in section["oneOf"]]
            parts.append(_presets(name, presets, unread, changeable))
        for heading, prefix, definition in _definitions(name, section, schema["$defs"]):
            parts.append(_section(heading, prefix, definition, unread, changeable))
    return "\n".join(parts)


def _standard(node: Any) -> Any:
    """A schema without pydantic's titles, and with the limits that it leaves under its own names where a validator comes first."""
    if isinstance(node, list):
        return [_standard(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _standard(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    return {_KEYWORDS.get(key, key) if isinstance(value, int | float) else key: value for key, value in made.items()}


def _unread() -> dict[str, list[str]]:
    """Why a run may not read an option, by dotted name."""
    found: dict[str, list[str]] = {}
    for options in _RUNS:
        config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "m"}, **options})
        for key, reason in inapplicable(config).items():
            if reason not in found.setdefault(key, []):
                found[key].append(reason)
    return found


def _definitions(name: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The tables of one section, as heading, what precedes its options' names, and schema.

    They are its own, unless it is one of several, and those of options that are sections, lists of sections, or sections by name.
    """
    if "oneOf" not in section:
        yield f"`{name}`", f"{name}.", definitions[_referred(section)]
    inside: dict[str, tuple[str, str]] = {}
    for reference in section.get("oneOf", [section]):
        for option, about in definitions[_referred(reference)]["properties"].items():
            inner, single = _inner(about), _optional(about)
            if inner is not None:
                inside[option] = f"Each of `{name}.{option}`", inner
            elif single is not None:
                inside[option] = f"`{name}.{option}`", single
    for heading, definition in inside.values():
        yield heading, "", definitions[definition]


def _inner(about: Mapping[str, Any]) -> str | None:
    """The sections that an option is a list or a mapping of, by their definition; None for any other option."""
    inner = about.get("items", about.get("additionalProperties"))
    return _referred(inner) if isinstance(inner, Mapping) and "$ref" in inner and _referred(inner) != _ANY_VALUE else None


def _optional(about: Mapping[str, Any]) -> str | None:
    """The section that an option is if it is given, by its definition; None for any other option."""
    return next((_referred(part) for part in about.get("anyOf", ()) if "$ref" in part), None)


def _presets(name: str, presets: Sequence[Mapping[str, Any]], unread: Mapping[str, list[str]], changeable: Container[str]) -> str:
    """One section that is one of several, which share most options: what each is, and one table with the defaults of all."""
    merged: dict[str, Any] = {}
    kinds = [preset["properties"]["name"]["const"] for preset in presets]
    for option in dict.fromkeys(option for preset in presets for option in preset["properties"]):
        having = {kind: p["properties"][option] for kind, p in zip(kinds, presets, strict=True) if option in p["properties"]}
        merged[option] = {**next(iter(having.values())), "description": _of_some(having, kinds), "defaults": _defaults(having)}
    merged["name"] = {"enum": kinds, "description": "Which algorithm this is, and so the defaults of the others."}
    lines = [f"`{kind}`: {_linked(preset['description'])}" for kind, preset in zip(kinds, presets, strict=True)]
    what = "The name sets the defaults; docs/algorithms.md has the formulas.\n\n" + "\n".join(f"- {line}" for line in lines)
    required = sorted({option for preset in presets for option in preset["required"]})
    definition = {"description": what, "properties": merged, "required": required}
    return _section(f"`{name}`", f"{name}.", definition, unread, changeable)


def _of_some(having: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """An option's description, with the presets that do not have it."""
    lacking = [kind for kind in kinds if kind not in having]
    which = f" Only of {', '.join(having)}." if len(having) <= len(lacking) else f" Not of {', '.join(lacking)}." if lacking else ""
    return next(iter(having.values())).get("description", "") + which


def _defaults(having: Mapping[str, Mapping[str, Any]]) -> str:
    """The commonest default, then the others with the presets that have them."""
    by_value: dict[str, list[str]] = {}
    for kind, about in having.items():
        by_value.setdefault(_default(about), []).append(kind)
    common, *others = sorted(by_value, key=lambda value: -len(by_value[value]))
    return "; ".join([common, *(f"{value}: {', '.join(by_value[value])}" for value in others)])


def _referred(reference: Mapping[str, Any]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _section(heading: str, prefix: str, definition: Mapping[str, Any], unread: Mapping[str, list[str]], changeable: Container[str]) -> str:
    lines = [f"## {heading}", ""]
    if definition.get("description"):
        lines += [_linked(definition["description"]), ""]
    lines += ["| Option | Type | Default | What it does |", "|---|---|---|---|"]
    notes: dict[str, int] = {}  # reasons in the order in which they come up: many options share one
    for option, about in definition["properties"].items():
        key = prefix + option
        numbers = [f"({notes.setdefault(reason, len(notes) + 1)})" for reason in unread.get(key, ())]
        what = about.get("description", "")
        cells = (
            f"`{key}`" + (" ↻" if key in changeable else ""),
            _type(about),
            "required" if option in definition.get("required", ()) else about.get("defaults") or _default(about),
            _linked(what) + (f" *Not read {' '.join(numbers)}.*" if numbers else ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines.append("")
    for reason, number in notes.items():
        lines += [f"({number}) Not read: {_linked(reason)}.", ""]
    return "\n".join(lines)


def _linked(text: str) -> str:
    return re.sub(r"`?docs/([a-z-]+\.md)`?", r"[docs/\1](\1)", text)


def _default(about: Mapping[str, Any]) -> str:
    default = about.get("default", {} if about.get("type") == "object" else [] if about.get("type") == "array" else None)
    if default is None:
        return "none"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _type(about: Mapping[str, Any]) -> str:
    """A type with its limits, in plain words."""
    choices = about.get("enum", [about["const"]] if "const" in about else None)
    if choices is not None:
        return ", ".join(f"`{choice}`" for choice in choices)
    if _optional(about) is not None:
        return "section, below"
    if "anyOf" in about:
        return ", or ".join(_type(part) for part in about["anyOf"] if part.get("type") != "null")
    kind = about["type"]
    if kind == "array":
        return _list_type(about)
    if kind == "object" and _inner(about) is not None:
        return "sections by name, below"
    if kind in ("integer", "number"):
        return {"integer": "whole number", "number": "number"}[kind] + _range(about)
    if kind == "string":
        return "text" + (f" that matches `{about['pattern']}`" if "pattern" in about else "")
    return {"boolean": "`true`, `false`", "object": "mapping of names to values"}[kind]


def _list_type(about: Mapping[str, Any]) -> str:
    if "prefixItems" in about:
        return f"list of {len(about['prefixItems'])}: " + ", ".join(dict.fromkeys(_type(part) for part in about["prefixItems"]))
    return "list of sections, below" if "$ref" in about["items"] else f"list of: {_type(about['items'])}"


def _range(about: Mapping[str, Any]) -> str:
    low, above = about.get("minimum"), about.get("exclusiveMinimum")
    high, below = about.get("maximum"), about.get("exclusiveMaximum")
    if about["type"] == "integer":
        low = low if above is None else max(low or 0, above + 1)
        above = None
        high = None if high == _LARGEST else high
    lower = f"above {above:.12g}" if above is not None else "" if low is None else f"from {low:.12g}"
    upper = f"below {below:.12g}" if below is not None else "" if high is None else f"up to {high:.12g}"
    both = ", ".join(part for part in (lower, upper) if part)
    return f" {both}" if both else ""
