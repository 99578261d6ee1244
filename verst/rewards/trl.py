"""Reward functions written for TRL's `GRPOTrainer`, as they are: `trl:module:function`.

TRL calls a function with the lists of a batch; here it is called with lists of one. So a trajectory that breaks a function fails alone and
has its own deadline, and async functions wait for many trajectories at a time. A function that compares completions with one another
would see one only, and does not fit. Signature: https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function".
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from verst.errors import ExtensionError, RewardFailure
from verst.extend import is_async
from verst.rewards.conversation import as_dicts, as_text, split
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


def adapt(functions: Mapping[str, Callable[..., Any]], conversational: bool = True, weights: Sequence[float] | None = None) -> Any:
    """One reward of Verst: the sum of what the functions return, each times its weight.

    conversational: prompts and completions are lists of messages, as in TRL's conversational format; otherwise plain text, joined.
    weights: one for each function, as `GRPOConfig.reward_weights`. Default: 1 each.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ExtensionError(f"reward option weights has {len(weights)} entries for {len(functions)} functions: give one for each")
    signatures = {name: inspect.signature(function) for name, function in functions.items()}
    for name, signature in signatures.items():
        check_signature(name, signature)
    calls = [(name, function, signatures[name], float(weight)) for (name, function), weight in zip(functions.items(), weights, strict=True)]

    def scores(trajectory: Trajectory, fields: Mapping[str, Any]) -> list[tuple[str, float, Any]]:
        given = _arguments(trajectory, fields, conversational)
        return [(name, weight, function(**_taken(name, signature, given))) for name, function, signature, weight in calls]

    def plain(trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        return _sum(scores(trajectory, fields))

    async def waiting(trajectory: Trajectory, fields: Mapping[str, Any]) -> float:
        found = scores(trajectory, fields)
        values = await asyncio.gather(*(_awaited(value) for _, _, value in found))
        return _sum([(name, weight, value) for (name, weight, _), value in zip(found, values, strict=True)])

    return waiting if any(is_async(function) for function in functions.values()) else plain


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _arguments(trajectory: Trajectory, fields: Mapping[str, Any], conversational: bool) -> dict[str, Any]:
    opening, answer = split(trajectory)
    show = as_dicts if conversational else as_text
    first = trajectory.turns[0].generated if trajectory.turns else 0
    versions_T = trajectory.versions_T[trajectory.versions_T != NO_VERSION]
    return {
        **{name: [value] for name, value in fields.items() if name not in ("prompt", "completion")},
        "prompts": [show(opening)],
        "completions": [show(answer)],
        "completion_ids": [trajectory.tokens_T[first:].tolist()],
        # steps are what a trainer counts, and a version is the steps before it
        "trainer_state": SimpleNamespace(global_step=int(versions_T.max(initial=0))),
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


def _sum(scores: Sequence[tuple[str, float, Any]]) -> float:
    """As TRL: what is None does not count. Of one function alone the worker checks the number."""
    found: list[float] = []
    for name, weight, value in scores:
        if not isinstance(value, Sequence) and hasattr(value, "tolist"):
            value = value.tolist()  # an array or a tensor, which TRL would take
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 1:
            raise RewardFailure(f"{name} returned {str(value)[:60]!r} for one completion: return a list with one number or None")
        if value[0] is None:
            continue
        number = value[0].item() if hasattr(value[0], "item") else value[0]
        if not isinstance(number, int | float):
            raise RewardFailure(f"{name} returned {str(value)[:60]!r}: return a list with one number or None")
        if len(scores) > 1:
            record(name.rpartition(":")[2], number)
        found.append(weight * number)
    if not found:
        raise RewardFailure("returned None for this prompt: no function says what it is worth; leave such prompts out, or add a function")
    return sum(found)
