"""Custom reward functions of slime and Miles (`--custom-rm-path`), as they are: `slime:module:function`.

Signatures: `async def custom_rm(args, sample)`, or with `samples`, a list of all samples of a group (`--group-rm`).
https://github.com/THUDM/slime/blob/main/docs/en/get_started/customization.md
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from verst.errors import ExtensionError, RewardFailure, first_line
from verst.extend import is_async
from verst.rewards.conversation import as_dicts, as_text, split
from verst.rewards.grouped import one_each
from verst.rewards.metrics import record
from verst.slime_api import GENERATED, label_of, load_tokenizer, make_arguments, metadata_of, sample_class
from verst.types import NO_VERSION, Message, Status, Trajectory

EXPECTED = "async def rm(args, sample) -> float, or async def rm(args, samples) -> list of float"


def check_signature(name: str, signature: inspect.Signature) -> None:
    """Raises `ExtensionError`, with the signature expected, for a function that cannot be called with two arguments."""
    try:
        signature.bind("args", "sample")
    except TypeError as error:
        raise ExtensionError(
            f"reward {name!r} is {signature}, which slime could not call either ({error}); expected: {EXPECTED}"
        ) from error


def adapt(name: str, function: Callable[..., Any], options: Mapping[str, Any], model: str | None = None) -> Any:
    """A reward of Verst. `options` are the attributes of `args`; label_key, metadata_key and reward_key mean what they do in slime.

    So do hf_checkpoint, by default `model`, and apply_chat_template, by default true: a sample's prompt is the text that the policy was
    given. Without either it is what the data has. Raises `ExtensionError` if there is no tokenizer.
    """
    known = {} if model is None else {"hf_checkpoint": model}
    options = known | {"apply_chat_template": True} | dict(options)
    signature = inspect.signature(function)
    check_signature(name, signature)
    batched = list(signature.parameters)[1:2] == ["samples"]
    args = make_arguments("reward.options", options)
    tokenizer = _tokenizer(name, options)

    def call(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        return function(args, _sample(trajectory, fields, options, tokenizer))

    def call_group(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> Any:
        return function(args, [_sample(trajectory, fields, options, tokenizer) for trajectory in trajectories])

    def plain(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        return _value(call(trajectory, fields), options)

    async def waiting(trajectory: Trajectory, fields: Mapping[str, Any]) -> Any:
        return _value(await call(trajectory, fields), options)

    def plain_group(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[Any]:
        return _values(call_group(trajectories, fields), len(trajectories), options)

    async def waiting_group(trajectories: Sequence[Trajectory], fields: Mapping[str, Any]) -> list[Any]:
        return _values(await call_group(trajectories, fields), len(trajectories), options)

    kinds = {False: (plain, waiting), True: (plain_group, waiting_group)}
    return kinds[batched][is_async(function)]


def _tokenizer(name: str, options: Mapping[str, Any]) -> Any:
    """None: prompts are not shown through the chat template."""
    path = options.get("hf_checkpoint")
    if path is None or not options["apply_chat_template"]:
        return None
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ExtensionError(
            f"reward {name!r}: {path} has no tokenizer ({first_line(error)}), by which sample.prompt would be text: name its directory as "
            "reward.options.hf_checkpoint, or set reward.options.apply_chat_template=false"
        ) from error


def _prompt(trajectory: Trajectory, opening: Sequence[Message], first: int, tokenizer: Any) -> Any:
    """As the generate function's sample has it (`verst.rollout.slime`); of the tokens, which is what the policy was given."""
    if tokenizer is not None:
        return tokenizer.decode(trajectory.tokens_T[:first].tolist(), clean_up_tokenization_spaces=False)
    return opening[0].content if len(opening) == 1 else as_dicts(opening)


def _sample(trajectory: Trajectory, fields: Mapping[str, Any], options: Mapping[str, Any], tokenizer: Any) -> Any:
    opening, answer = split(trajectory)
    first = trajectory.turns[0].generated if trajectory.turns else len(trajectory.tokens_T)
    group, _, member = trajectory.id.partition("/")
    versions = {int(v) for v in trajectory.versions_T if v != NO_VERSION}
    kind = sample_class()
    generated = trajectory.info.get(GENERATED, {})  # what a generate function left in its sample
    values = {
        "group_index": int(group),
        "index": int(member),
        "prompt": _prompt(trajectory, opening, first, tokenizer),
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


def _value(value: Any, options: Mapping[str, Any]) -> Any:
    reward, others = _parts(value, options)
    for name, part in others.items():
        record(name, part)
    return reward


def _values(values: Any, count: int, options: Mapping[str, Any]) -> list[Any]:
    """The rewards of a group. What else they have is recorded as its mean."""
    parts = [_parts(value, options) for value in one_each(values, count, "samples")]
    for name in dict.fromkeys(name for _, others in parts for name in others):
        found = [others[name] for _, others in parts if name in others]
        record(name, sum(found) / len(found))
    return [reward for reward, _ in parts]


def _parts(value: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
    """The reward in what a function returned, and the other numbers, by name."""
    if not isinstance(value, Mapping):
        return value, {}
    key = options.get("reward_key")
    if key not in value:
        raise RewardFailure(f"returned a dict with {', '.join(map(str, value))}: name the one to train by as reward.options.reward_key")
    others = {str(name): float(part) for name, part in value.items() if name != key and isinstance(part, numbers.Real | np.bool_)}
    return value[key], others
