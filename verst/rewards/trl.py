"""Reward functions written for TRL's `GRPOTrainer`, as they are: `trl:module:function`.

TRL calls a function with the lists of a batch; here it is called with lists of one. So a trajectory that breaks a function fails alone and
has its own deadline, and async functions wait for many trajectories at a time. A function that compares completions with one another gets
those of a group with the option `whole_group`. Signature: https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function".
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from verst.errors import ExtensionError, RewardFailure
from verst.extend import is_async
from verst.rewards.conversation import as_dicts, as_text, split
from verst.rewards.grouped import one_each
from verst.rewards.metrics import record
from verst.types import NO_VERSION, Trajectory

EXPECTED = "def reward(prompts, completions, **kwargs) -> list of float or None, plain or async; kwargs are the prompt's fields, as lists"
SEVERAL = "+"
"""Joins the functions of one reward: `trl:my_module:correct+my_module:format`."""

_COMPLETIONS = {"completions", "completion_ids", "completions_ids"}  # the documentation has had both spellings of the ids


def check_signature(name: str, signature: inspect.Signature) -> None:
    """Raises `ExtensionError`, with the signature expected, for a function that takes no completions by name."""
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    by_position = [p for p, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
    if by_position or not (_COMPLETIONS & kinds.keys() or inspect.Parameter.VAR_KEYWORD in kinds.values()):
        raise ExtensionError(f"reward {name!r} is {signature}, which TRL could not call either; expected: {EXPECTED}")


def adapt(
    functions: Mapping[str, Callable[..., Any]],
    conversational: bool = True,
    weights: Sequence[float] | None = None,
    whole_group: bool = False,
) -> Any:
    """One reward of Verst: the sum of what the functions return, each times its weight.

    conversational: prompts and completions are lists of messages, as in TRL's conversational format; otherwise plain text, joined.
    weights: one for each function, as `GRPOConfig.reward_weights`. Default: 1 each.
    whole_group: functions are called once for a group, with lists of its completions, and not once for each.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ExtensionError(f"reward option weights has {len(weights)} entries for {len(functions)} functions: give one for each")
    signatures = {name: inspect.signature(function) for name, function in functions.items()}
    for name, signature in signatures.items():
        check_signature(name, signature)
    metrics = _metrics(list(functions))
    calls = [
        (name, metric, function, signatures[name], float(weight))
        for (name, function), metric, weight in zip(functions.items(), metrics, weights, strict=True)
    ]

    def scores(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[Score]:
        given = _arguments(trajectories, fields, conversational)
        return [Score(name, metric, weight, function(**_taken(name, sig, given))) for name, metric, function, sig, weight in calls]

    async def waited(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[Score]:
        found = scores(trajectories, fields)
        values = await asyncio.gather(*(_awaited(score.values) for score in found))
        return [score._replace(values=value) for score, value in zip(found, values, strict=True)]

    def plain(trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        return _only(_sums(scores([trajectory], fields), 1))

    async def waiting(trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        return _only(_sums(await waited([trajectory], fields), 1))

    def plain_group(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[float | None]:
        return _sums(scores(trajectories, fields), len(trajectories))

    async def waiting_group(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[float | None]:
        return _sums(await waited(trajectories, fields), len(trajectories))

    kinds = {False: (plain, waiting), True: (plain_group, waiting_group)}
    return kinds[whole_group][any(is_async(function) for function in functions.values())]


class Score(NamedTuple):
    """What one function returned for all completions."""

    name: str
    metric: str
    weight: float
    values: Any


def _metrics(references: Sequence[str]) -> list[str]:
    """Names of the functions alone; the whole references of those with the same one, whose values would be added up."""
    bare = [reference.rpartition(":")[2] for reference in references]
    return [name if bare.count(name) == 1 else reference for name, reference in zip(bare, references, strict=True)]


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _arguments(trajectories: Sequence[Trajectory], fields: Mapping[str, Any], conversational: bool) -> dict[str, Any]:
    show = as_dicts if conversational else as_text
    parts = [split(trajectory) for trajectory in trajectories]
    firsts = [t.turns[0].generated if t.turns else 0 for t in trajectories]
    newest = [int(t.versions_T[t.versions_T != NO_VERSION].max(initial=0)) for t in trajectories]
    return {
        **{name: [value] * len(trajectories) for name, value in fields.items() if name not in ("prompt", "completion")},
        "prompts": [show(opening) for opening, _ in parts],
        "completions": [show(answer) for _, answer in parts],
        "completion_ids": [t.tokens_T[first:].tolist() for t, first in zip(trajectories, firsts, strict=True)],
        # steps are what a trainer counts, and a version is the steps before it
        "trainer_state": SimpleNamespace(global_step=max(newest)),
        "log_metric": record,
        "log_extra": _ignore,
    }


def _ignore(column: str, values: Sequence[Any]) -> None:
    """`log_extra` adds a column to TRL's table of completions; Verst's has its own columns."""


def _taken(name: str, signature: inspect.Signature, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the function is called with. Raises `RewardFailure` for a column that the prompt lacks."""
    given = {**given, "completions_ids": given["completion_ids"]} if "completions_ids" in signature.parameters else given
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        taken = given
    else:
        taken = {key: value for key, value in given.items() if key in signature.parameters}
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    missing = [key for key in needed if key not in taken]
    if missing:
        raise RewardFailure(f"{name} needs the column {missing[0]!r}, which the prompt does not have; it has: {', '.join(given)}")
    return taken


def _sums(scores: Sequence[Score], count: int) -> list[float | None]:
    """Of each completion, as TRL: None and NaN do not count. None: no function says what it is worth.

    What is infinite fails its completion alone, so it is in no mean.
    """
    columns = [(score, _numbers(score, count)) for score in scores]
    if len(scores) > 1:
        columns = [(score, [None if number is None or math.isnan(number) else number for number in column]) for score, column in columns]
        for score, column in columns:
            known = [number for number in column if number is not None and math.isfinite(number)]
            if known:
                record(score.metric, sum(known) / len(known))
    found = [[score.weight * number for score, column in columns if (number := column[i]) is not None] for i in range(count)]
    return [sum(parts) if parts else None for parts in found]


def _numbers(score: Score, count: int) -> list[Any]:
    """One number or None for each completion. Of those of the only function the worker checks that they are finite."""
    try:
        values = one_each(score.values, count, "completion(s)")
    except RewardFailure as failure:
        raise RewardFailure(f"{score.name} {failure}") from None
    numbers = [value.item() if hasattr(value, "item") else value for value in values]
    if any(number is not None and not isinstance(number, int | float) for number in numbers):
        raise RewardFailure(f"{score.name} returned {str(score.values)[:60]!r}: return a list of numbers or None")
    return numbers


def _only(sums: Sequence[float | None]) -> float:
    (found,) = sums
    if found is None:
        raise RewardFailure("returned None for this prompt: no function says what it is worth; leave such prompts out, or add a function")
    return found
