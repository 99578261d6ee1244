"""The rewards shipped with Verst. Each is made once in a worker process from its options, and called once for each trajectory.

What is scored is the text of the last generated turn, `trajectory.completion`. A prompt without the field a reward needs raises
`RewardFailure`: it is a fault of the data, and 0 would blame the model for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from verst.errors import ExtensionError, RewardFailure
from verst.types import Trajectory


class ExactMatch:
    """1 if the completion equals the field `field`, else 0. `strip` ignores white space around both, `ignore_case` their case."""

    def __init__(self, field: str = "answer", strip: bool = True, ignore_case: bool = False) -> None:
        self._field, self._strip, self._ignore_case = field, strip, ignore_case

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        return float(self._normal(trajectory.completion) == self._normal(_text_field(fields, self._field)))

    def _normal(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text.casefold() if self._ignore_case else text


class Regex:
    """1 if `pattern` is found in the completion, else 0. `.` matches newlines too.

    With `group` (number or name) what that group matched, stripped, must also equal the field `field`; of several matches the last counts.
    `whole` asks that the pattern match the completion from start to end, as a check of its format.
    """

    def __init__(self, pattern: str, group: int | str | None = None, field: str = "answer", whole: bool = False) -> None:
        self._pattern = _compiled(pattern, group)
        self._group, self._field, self._whole = group, field, whole

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        match = self._pattern.fullmatch(trajectory.completion) if self._whole else _last_match(self._pattern, trajectory.completion)
        if match is None:
            return 0.0
        if self._group is None:
            return 1.0
        return float((match[self._group] or "").strip() == _text_field(fields, self._field).strip())


class FromInfo:
    """What the environment says: Σ weight × `trajectory.info[key]`, where true is 1 and false 0.

    `weights` by key: {solved: 1, guesses: -0.02} gives 1 for a solved trajectory, less what its guesses cost. A key that the environment
    did not report, or that is no finite number, raises `RewardFailure`.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping) or not weights:
            raise ExtensionError(
                f"reward from_info: option weights is {weights!r}: name what the environment reports, such as {{solved: 1}}"
            )
        for key, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ExtensionError(f"reward from_info: the weight of {key!r} is {weight!r}, not a finite number: give one")
        self._weights = dict(weights)

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        return float(sum(weight * _reported(trajectory.info, key) for key, weight in self._weights.items()))


class MathVerify:
    """1 if the completion's last mathematical expression equals the field `field`, by math-verify (LaTeX or plain), else 0.

    `timeout_s` limits each of parsing and comparing, in whole seconds; past it the reward fails rather than call the answer wrong.
    """

    def __init__(self, field: str = "answer", timeout_s: int = 5) -> None:
        import math_verify
        from math_verify.errors import TimeoutException

        self._field, self._timeout_s = field, timeout_s
        self._math, self._timeout_error = math_verify, TimeoutException

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        answer = _text_field(fields, self._field)
        try:
            gold = self._parse(answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}")
            if not gold:
                raise RewardFailure(f"math-verify finds no expression in field {self._field!r}: {answer[:80]!r}")
            found = self._parse(trajectory.completion)
            return float(self._math.verify(gold, found, timeout_seconds=self._timeout_s, raise_on_error=True))
        except self._timeout_error as error:  # a BaseException, so that nothing inside sympy swallows it
            raise RewardFailure(f"math-verify exceeded {self._timeout_s} s: {str(error)[:80]}") from error

    def _parse(self, text: str) -> list[Any]:
        return self._math.parse(text, parsing_timeout=self._timeout_s, raise_on_error=True)


class ReasoningGym:
    """The score, in [0, 1], that the prompt's reasoning-gym task gives the completion. Needs prompts from `data.task`.

    `pattern` takes the answer out of the completion: its first group (or all of it) in its last match, 0 if it is not found. `tag`
    "answer" is short for the pattern of `<answer>…</answer>`. Without either the whole stripped completion is the answer.
    """

    def __init__(self, pattern: str | None = None, tag: str | None = None) -> None:
        import reasoning_gym

        if pattern is not None and tag is not None:
            raise ExtensionError("reward reasoning_gym: options pattern and tag are both given; keep one")
        if tag is not None:
            pattern = f"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>"
        self._pattern = None if pattern is None else _compiled(pattern)
        self._create = reasoning_gym.create_dataset
        self._dataset = lru_cache(maxsize=16)(self._make)

    def __call__(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        if not {"task", "options", "entry"} <= fields.keys():
            raise RewardFailure(f"the prompt's fields {', '.join(fields) or '(none)'} are not of a reasoning-gym task; set data.task")
        answer = trajectory.completion.strip()
        if self._pattern is not None:
            match = _last_match(self._pattern, trajectory.completion)
            if match is None:
                return 0.0
            answer = (match[1 if self._pattern.groups else 0] or "").strip()
        dataset = self._dataset(fields["task"], json.dumps(fields["options"], sort_keys=True))
        return dataset.score_answer(answer=answer, entry=from_exact_json(fields["entry"]))

    def _make(self, task: str, options: str) -> Any:
        return self._create(task, **json.loads(options) | {"seed": 0})  # scoring draws no numbers; a seed is asked for all the same


def from_exact_json(value: Any) -> Any:
    """Tuples and mappings as they were before `verst.data.tasks.exact_json`."""
    if isinstance(value, list):
        return [from_exact_json(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"tuple"}:
        return tuple(from_exact_json(item) for item in value["tuple"])
    if value.keys() == {"mapping"}:
        return {from_exact_json(key): from_exact_json(item) for key, item in value["mapping"]}
    return {key: from_exact_json(item) for key, item in value.items()}


def _reported(info: Mapping[str, Any], key: str) -> float:
    if key not in info:
        raise RewardFailure(f"the environment reported no {key!r}; it reported: {', '.join(info) or 'nothing'}")
    value = info[key]
    if not isinstance(value, int | float) or not math.isfinite(value):  # a bool is an int
        raise RewardFailure(f"the environment reported {key!r} as {value!r:.80}; it must be a number, or true or false")
    return float(value)


def _text_field(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise RewardFailure(f"the prompt has no field {name!r}; its fields: {', '.join(fields) or 'none'}")
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a column of numbers is common in tables; 42 is what a model would write
    raise RewardFailure(f"the prompt's field {name!r} is {type(value).__name__}; it must be text or a number")


def _compiled(pattern: str, group: int | str | None = None) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ExtensionError(f"reward option pattern {pattern!r} is not a regular expression: {error}") from error
    known = [*range(compiled.groups + 1), *compiled.groupindex]
    if group is not None and group not in known:
        raise ExtensionError(f"reward option group {group!r} is not a group of {pattern!r}; its groups: {known}")
    return compiled


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None
