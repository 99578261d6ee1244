"""Run files: YAML plus `a.b=c` overrides into one validated `Config`.

Nothing is ignored: unknown and repeated keys are errors that name the line and the nearest valid name. What is wrong with a value is put
into words by `verst.config.mistakes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from verst.config.checks import inapplicable
from verst.config.mistakes import Places, explain, known_options
from verst.config.schema import Config
from verst.config.text import NotYaml, dump, is_unicode, key_lines, parse
from verst.errors import ConfigError

_DEEPEST = 50  # mappings in each other


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a run file (or takes a mapping), applies overrides such as `train.lr=1e-5`, and validates.

    Raises:
        ConfigError: names every invalid key, its line in the file or its override, and what would be valid.
    """
    if isinstance(source, Mapping):
        values, places = _copy(source), Places("config", {})
    else:
        values, places = _read(Path(source))
    for override in overrides:
        places = places.overridden(_apply(values, override), override)
    try:
        return Config.model_validate(values)
    except ValidationError as invalid:
        raise ConfigError(explain(invalid, places)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; it can be read back as a run file."""
    return dump(resolved(config))


def resolved(config: Config) -> dict[str, Any]:
    """Every option that applies, with its value, section by section: what `load_config` accepts again."""
    values = config.model_dump(mode="json")
    for key in inapplicable(config):
        section, name = key.split(".")
        values[section].pop(name, None)
    return {section: options for section, options in values.items() if options}


def _copy(values: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    if depth > _DEEPEST:
        raise ConfigError(f"config: mappings lie more than {_DEEPEST} deep in each other: a run file has sections and options")
    for key in values:
        if not isinstance(key, str) or not is_unicode(key):
            raise ConfigError(f"config: the key {key!r} is {type(key).__name__}, not text in UTF-8: options are named by text")
    return {k: _copy(v, depth + 1) if isinstance(v, Mapping) else v for k, v in values.items()}


def _read(path: Path) -> tuple[dict[str, Any], Places]:
    """The file's values, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file; `verst init` writes one") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}): give a run file (YAML) that you may read") from error
    try:
        values, root = parse(text)
        lines = key_lines(root)
    except NotYaml as error:
        raise ConfigError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of sections such as 'run:' and 'model:', found {type(values).__name__}")
    return values, Places(str(path), {key: f"{path}:{line}" for key, line in lines.items()})


def _apply(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets one `a.b=c` in place and returns its key. The value is read as YAML, so numbers and lists work; `null` unsets what was set."""
    dotted, sign, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not sign or not all(key):
        raise ConfigError(f"override {override!r}: expected KEY=VALUE with a dotted key, such as train.lr=1e-5")
    if not is_unicode(override):
        raise ConfigError(f"override {override!r}: it is not UTF-8; write it in UTF-8")
    try:
        value, root = parse(text)
        key_lines(root)
    except NotYaml as error:
        raise ConfigError(f"override {override!r}: the value is {error}") from error
    section = values
    for part in key[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {part} is not a section that could have options: leave out what follows it")
    if value is None and key[-1] in section:
        del section[key[-1]]
    else:
        section[key[-1]] = value
    return key


def option_names(algorithm: str = "grpo") -> list[str]:
    """Every option by its dotted name; sections themselves are left out."""
    keys = known_options(Config, (), algorithm)
    return [".".join(k) for k in keys if not any(other[: len(k)] == k and other != k for other in keys)]
