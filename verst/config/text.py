"""YAML as run files and overrides use it: what is wrong with a text, and on which line, in words of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_HINTS = {
    "\\t": "indent with spaces, YAML allows no tabs",
    "unhashable key": "a key is text, not a list or a mapping",
    "could not determine a constructor": "remove the !tag: plain text, numbers, lists and mappings are enough",
    "single document": "keep one document: remove the line '---' and what does not belong to the run",
    "mapping values are not allowed": "put text that has ': ' in it into quotes, and indent the options of a section alike",
    "undefined alias": "*NAME needs &NAME before it; put text that begins with * into quotes",
    "special characters": "remove the control character, or write it as an escape within double quotes",
}
_SHOWN = 40  # characters of a value
_HINT = "check indentation, brackets and quotes"
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """What is wrong with a text, and what to do. `line`: where (from 1), if that is known."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which names the place of scalars that are not what they look like (the date 2026-13-40)."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            text = str(node.value)
            problem = f"{text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'!r} is no {kind}: put it in quotes if it is text"
            raise ConstructorError(None, None, problem, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper. By itself it writes some line breaks of Unicode so that they are read back as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(_STRING, data, style=None if data.isprintable() or data.isascii() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(values: Any) -> str:
    """YAML that `parse` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its syntax tree. Raises `NotYaml`."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return (None if root is None else loader.construct_document(root)), root
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _explained(error) from error
    except RecursionError:
        raise NotYaml("not valid YAML: values lie too deep in each other: a run file has sections and options", None) from None


def is_unicode(text: str) -> bool:
    """Whether it can be written in UTF-8: half a surrogate pair, as an escape or a command line may bring one, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def key_lines(root: yaml.Node | None) -> dict[tuple[str, ...], int]:
    """The line of each key, from 1. Raises `NotYaml` for a key that is set twice or is no text."""
    lines: dict[tuple[str, ...], int] = {}
    for key, node in _keys(root, (), set()):
        line = node.start_mark.line + 1
        if node.tag not in (_STRING, _MERGE):
            raise NotYaml(f"the key {node.value!r} is read as {node.tag.rpartition(':')[2]}, not as text: put it in quotes", line)
        if not is_unicode(key[-1]):
            raise NotYaml(f"the key {key[-1]!r} cannot be written in UTF-8: write it without that escape", line)
        if key in lines:
            raise NotYaml(f"{'.'.join(key)} is set twice (first on line {lines[key]}): remove one", line)
        lines[key] = line
    return lines


def _keys(node: yaml.Node | None, prefix: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    """A mapping that aliases repeat is gone through once: it may contain itself."""
    if isinstance(node, yaml.MappingNode) and id(node) not in seen:
        seen.add(id(node))
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key
            yield from _keys(value, path, seen)


def _explained(error: yaml.YAMLError) -> NotYaml:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    said = f"{problem} ({context})" if context else str(problem)
    if ": put it in quotes" in said:
        return NotYaml(said, mark.line + 1 if mark else None)
    hint = next((hint for part, hint in _HINTS.items() if part in said), _HINT)
    return NotYaml(f"not valid YAML: {said}: {hint}", mark.line + 1 if mark else None)
