"""Custom reward functions of slime and Miles (`--custom-rm-path`), as they are: `slime:module:function`.

Signatures: `async def custom_rm(args, sample)`, or with `samples` a list (`--group-rm`), which has one sample here: a trajectory is scored,
fails and has its deadline alone. A function that compares the samples of a group with one another does not fit.
https://github.com/THUDM/slime/blob/main/docs/en/get_started/customization.md
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from verst.errors import ExtensionError, RewardFailure
from verst.extend import is_async
from verst.rewards.conversation import as_dicts, as_text, split
from verst.rewards.metrics import record
from verst.slime_api import GENERATED, label_of, make_arguments, metadata_of, sample_class
from verst.types import NO_VERSION, Status, Trajectory

EXPECTED = "async def rm(args, sample) -> float, or async def rm(args, samples) -> list of float"


def check_signature(name: str, signature: inspect.Signature) -> None:
    """Raises `ExtensionError`, with the signature expected, for a function that cannot be called with two arguments."""
    try:
        signature.bind("args", "sample")
    except TypeError as error:
        raise ExtensionError(
            f"reward {name!r} is {signature}, which slime could not call either ({error}); expected: {EXPECTED}"
        ) from error


def adapt(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """A reward of Verst. `options` are the attributes of `args`; label_key, metadata_key and reward_key mean what they do in slime."""
    signature = inspect.signature(function)
    check_signature(name, signature)
    batched = list(signature.parameters)[1:2] == ["samples"]
    args = make_arguments("reward.options", options)

    def call(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        sample = _sample(trajectory, fields, options)
        return function(args, [sample] if batched else sample)

    def plain(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        return _value(call(trajectory, fields), batched, options)

    async def waiting(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        return _value(await call(trajectory, fields), batched, options)

    return waiting if is_async(function) else plain


def _sample(trajectory: Trajectory, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    opening, answer = split(trajectory)
    first = trajectory.turns[0].generated if trajectory.turns else len(trajectory.tokens_T)
    group, _, member = trajectory.id.partition("/")
    versions = {int(v) for v in trajectory.versions_T if v != NO_VERSION}
    kind = sample_class()
    generated = trajectory.info.get(GENERATED, {})  # what a generate function left in its sample
    values = {
        "group_index": int(group),
        "index": int(member),
        "prompt": as_dicts(opening),
        "tokens": trajectory.tokens_T.tolist(),
        "response": as_text(answer),
        "response_length": len(trajectory.tokens_T) - first,
        "label": label_of(fields, options),
        "loss_mask": trajectory.loss_mask_T[first:].astype(int).tolist(),
        "weight_versions": [str(version) for version in sorted(versions)],
        "rollout_log_probs": trajectory.logprobs_T[first:].tolist(),
        "status": kind.Status("truncated" if trajectory.status is Status.TRUNCATED else "completed"),
        "metadata": metadata_of(fields, options) | generated.get("metadata", {}),
    }
    known = {f.name for f in dataclasses.fields(kind)}
    sample = kind(**{name: value for name, value in values.items() if name in known})
    for name, value in generated.get("attributes", {}).items():
        setattr(sample, name, value)
    return sample


def _value(value: Any, batched: bool, options: Mapping[str, Any]) -> Any:
    if batched:
        if not isinstance(value, list | tuple) or len(value) != 1:
            raise RewardFailure(f"returned {str(value)[:60]!r} for a list of one sample: return a list with one reward")
        value = value[0]
    if not isinstance(value, Mapping):
        return value
    key = options.get("reward_key")
    if key not in value:
        raise RewardFailure(f"returned a dict with {', '.join(map(str, value))}: name the one to train by as reward.options.reward_key")
    for name, part in value.items():
        if name != key and isinstance(part, int | float):
            record(str(name), part)
    return value[key]
