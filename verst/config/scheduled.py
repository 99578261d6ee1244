"""Options that take another value from a step on: `run.changes`. What a step is trained by is a function of the run file and its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from verst.config.values import Section

if TYPE_CHECKING:
    from verst.config.schema import Config

SCHEDULABLE = (
    *("train.lr", "train.clip_norm"),
    *("algorithm.clip_low", "algorithm.clip_high", "algorithm.kl_coefficient", "algorithm.beta", "algorithm.overlong_share"),
    *("algorithm.normalize_std", "algorithm.dynamic_sampling", "algorithm.reward_above"),
)
"""Options that are read anew in each step, and that nothing is built from."""


def config_at(config: Config, step: int) -> Config:
    """The configuration that a step is trained by."""
    values: dict[str, Any] = {}
    for change in config.run.changes:
        values |= change.options if change.step <= step else {}
    if not values:
        return config
    sections = {key.split(".")[0] for key in values}
    return config.model_copy(update={section: _changed(getattr(config, section), _of(section, values)) for section in sections})


def changed_at(config: Config, step: int) -> dict[str, tuple[Any, Any]]:
    """Options that have another value in this step than in the one before, by dotted name, with both values."""
    before, after = config_at(config, step - 1), config_at(config, step)
    found = {
        key: (value_of(before, key), value_of(after, key)) for change in config.run.changes if change.step == step for key in change.options
    }
    return {key: values for key, values in found.items() if values[0] != values[1]}


def lines(config: Config) -> list[str]:
    """What changes when, for a person."""
    return [
        f"from step {change.step}: {key} {before} -> {after}"
        for change in config.run.changes
        for key, (before, after) in changed_at(config, change.step).items()
    ]


def problems(config: Config, inapplicable: Mapping[str, str]) -> list[str]:
    """What is wrong with `run.changes`. `inapplicable`: options that the run never reads, with the reasons."""
    found = []
    steps = [change.step for change in config.run.changes]
    if steps != sorted(set(steps)):
        found.append(f"run.changes has the steps {', '.join(map(str, steps))}: write them in order, each once")
    if steps and steps[-1] > config.run.steps:
        found.append(f"run.changes has step {steps[-1]}, but run.steps is {config.run.steps}: it would never come")
    for change in config.run.changes:
        told = (_problem(config, key, value, inapplicable) for key, value in change.options.items())
        found += [f"run.changes, step {change.step}: {problem}" for problem in told if problem is not None]
    return found


def value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _problem(config: Config, key: str, value: Any, inapplicable: Mapping[str, str]) -> str | None:
    if key not in SCHEDULABLE:
        return f"{key} cannot change at a step; what can: {', '.join(SCHEDULABLE)}"
    section, name = key.split(".")
    part = getattr(config, section)
    if name not in type(part).model_fields:
        return f"{config.algorithm.name} has no {key}"
    if key in inapplicable:
        return f"{key} does not apply: {inapplicable[key]}"
    if key == "algorithm.kl_coefficient" and not part.kl_coefficient:
        return f"{key} is 0 before, so no reference model is kept: begin with a value above 0, if ever so small"
    try:
        _changed(part, {name: value})
    except ValidationError as error:
        return f"{key} cannot be {value!r:.40}: {error.errors()[0]['msg']}"
    return None


def _of(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{section}.")}


def _changed(section: Section, values: Mapping[str, Any]) -> Section:
    return type(section).model_validate(section.model_dump() | dict(values))
