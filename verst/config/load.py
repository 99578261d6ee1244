"""Run files: YAML plus `a.b=c` overrides into one validated `Config`.

Nothing is ignored: unknown and repeated keys are errors that name the line and the nearest valid name.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from verst.config.checks import inapplicable
from verst.config.schema import Config, CorrectionConfig, GrpoConfig, SftConfig
from verst.errors import ConfigError

_ALGORITHMS: dict[str, type[BaseModel]] = {"grpo": GrpoConfig, "sft": SftConfig}


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a run file (or takes a mapping), applies overrides such as `train.lr=1e-5`, and validates.

    Raises:
        ConfigError: names every invalid key, its line in the file, and what would be valid.
    """
    if isinstance(source, Mapping):
        values, lines, name = _copy(source), {}, "config"
    else:
        values, lines = _read(Path(source))
        name = str(source)
    for override in overrides:
        key = _apply(values, override)
        lines = {k: v for k, v in lines.items() if k[: len(key)] != key}
    try:
        return Config.model_validate(values)
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, name, lines)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; it can be read back as a run file."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=120)


def resolved(config: Config) -> dict[str, Any]:
    """Every option that applies, with its value, section by section: what `load_config` accepts again."""
    values = config.model_dump(mode="json")
    for key in inapplicable(config):
        section, name = key.split(".")
        values[section].pop(name, None)
    return {section: options for section, options in values.items() if options}


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The file's values, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a run file is a mapping of sections such as 'run:' and 'model:', found {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    for key, line in _keys(root, ()):
        if key in lines:
            raise ConfigError(f"{path}:{line}: {'.'.join(key)} is set twice (first on line {lines[key]}): remove one")
        lines[key] = line
    return values, lines


def _keys(node: yaml.Node, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _keys(value, path)


def _apply(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets one `a.b=c` in place and returns its key. The value is read as YAML, so numbers and lists work; `null` unsets what was set."""
    dotted, sign, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not sign or not all(key):
        raise ConfigError(f"override {override!r}: expected KEY=VALUE with a dotted key, such as train.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    section = values
    for part in key[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {part} is not a section")
    if value is None and key[-1] in section:
        del section[key[-1]]
    else:
        section[key[-1]] = value
    return key


def _explain(invalid: ValidationError, name: str, lines: Mapping[tuple[str, ...], int]) -> str:
    problems: list[str] = []
    for error in invalid.errors():
        if error["loc"]:
            key = _key(error["loc"])
            problems.append(_placed(_problem(error, key), key, name, lines))
        else:  # rules between options: several, each of which begins with the option it is about
            rules = error["msg"].removeprefix("Value error, ").splitlines()
            problems += [_placed(rule, tuple(rule.split(" ", 1)[0].split(".")), name, lines) for rule in rules]
    return "\n".join(problems)


def _key(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """The option's key in the file. pydantic adds the algorithm's name ("algorithm", "grpo", "clip"), and what lies below an option."""
    parts = [str(p) for p in itertools.takewhile(lambda p: isinstance(p, str), loc)]
    if parts[0] == "algorithm" and parts[1:] and parts[1] in _ALGORITHMS:
        del parts[1]
    return tuple(parts[:3] if parts[1:2] in (["options"], ["environment_options"]) else parts)


def _in_list(loc: tuple[int | str, ...]) -> str:
    """Where an option of a list's sections lies in the list: " number 2: upper"; empty elsewhere."""
    within = next((i for i, part in enumerate(loc) if isinstance(part, int)), len(loc))
    return f" number {int(loc[within]) + 1}: {loc[within + 1]}" if within + 1 < len(loc) else ""


def _placed(problem: str, key: tuple[str, ...], name: str, lines: Mapping[tuple[str, ...], int]) -> str:
    line = lines.get(key)
    return f"{name}:{line}: {problem}" if line else f"{name}: {problem}"


def _problem(error: ErrorDetails, key: tuple[str, ...]) -> str:
    dotted = ".".join(key) + _in_list(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown option {dotted}{_suggestion(error, key)}"
    if error["type"] == "missing":
        return f"{dotted} is required"
    if error["type"] == "union_tag_invalid":
        return f"{dotted}.name: {error['input'].get('name')!r} is not an algorithm; there are: {', '.join(_ALGORITHMS)}"
    if error["type"] == "union_tag_not_found":
        return f"{dotted}.name is required: {' or '.join(_ALGORITHMS)}"
    return f"{dotted}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def _suggestion(error: ErrorDetails, key: tuple[str, ...]) -> str:
    """The nearest valid name in the same section, else the same name in another section, else the section's names."""
    algorithm = next((str(p) for p in error["loc"] if p in _ALGORITHMS), "grpo")
    if _in_list(error["loc"]):  # the one option that is a list of sections
        return f"; valid here: {', '.join(CorrectionConfig.model_fields)}"
    owners = [name for name, options in _ALGORITHMS.items() if key[0] == "algorithm" and key[-1] in options.model_fields]
    if owners:
        return f", an option of {' and '.join(owners)} that {algorithm} does not have"
    known = _options(Config, (), algorithm)
    siblings = [k[-1] for k in known if k[:-1] == key[:-1]]
    near = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join((*key[:-1], near[0]))}?"
    elsewhere = [".".join(k) for k in known if k[-1] == key[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _options(model: type[BaseModel], prefix: tuple[str, ...], algorithm: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        key = (*prefix, name)
        found.append(key)
        inner = _ALGORITHMS[algorithm] if name == "algorithm" else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _options(inner, key, algorithm)
    return found


def option_names(algorithm: str = "grpo") -> list[str]:
    """Every option by its dotted name; sections themselves are left out."""
    keys = _options(Config, (), algorithm)
    return [".".join(k) for k in keys if not any(other[: len(k)] == k and other != k for other in keys)]
