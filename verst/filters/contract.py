"""The contract of a filter, to be run on one's own in one call; `verst.testing` has it under the same name."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verst.filters.spec import check_filter_call, verdict_of
from verst.types import NO_VERSION, FinishReason, Group, Message, Prompt, Status, Trajectory, Turn


def check_filter(found: Any, groups: Sequence[Group], **options: Any) -> list[str | dict[str, str] | None]:
    """The contract of a filter (a function or a class, as in `filters.functions`), run on yours with its options.

    Raises `ExtensionError` if its signature does not fit, `CallFailed` for an answer that is none, whatever it raises itself, and
    `AssertionError` if it changes a group, or if an answer depends on more than the group: a resumed run may ask again, in another order.
    Returns the answers.
    """
    first, again = check_filter_call(found, options), check_filter_call(found, options)
    before = [pickle.dumps(group) for group in groups]
    answers = [verdict_of(first(group), group) for group in groups]
    for group, answer in reversed(list(zip(groups, answers, strict=True))):
        repeated = verdict_of(again(group), group)
        assert repeated == answer, f"group {group.seq} was answered {answer}, and when it was asked about again {repeated}"
    changed = [group.seq for group, was in zip(groups, before, strict=True) if pickle.dumps(group) != was]
    assert not changed, f"the filter changed groups {changed}"
    return answers


def make_group(
    completions: Sequence[str],
    rewards: Sequence[float] | None = None,
    *,
    prompt: str = "question",
    fields: Mapping[str, Any] | None = None,
    seq: int = 0,
) -> Group:
    """A finished group with these completions, one token for each byte. Default rewards: 0, 1, 2 and so on. `fields`: of its prompt."""
    given = prompt.encode()

    def trajectory(member: int, text: str) -> Trajectory:
        tokens_T = np.frombuffer(given + text.encode(), np.uint8).astype(np.int32)
        sampled_T = np.arange(len(tokens_T)) >= len(given)
        return Trajectory(
            id=f"{seq}/{member}",
            tokens_T=tokens_T,
            loss_mask_T=sampled_T,
            logprobs_T=np.where(sampled_T, -1.0, 0.0).astype(np.float32),
            versions_T=np.where(sampled_T, 0, NO_VERSION).astype(np.int32),
            turns=(Turn(0, len(given), len(tokens_T), FinishReason.STOP, text),),
            messages=(Message("user", prompt), Message("assistant", text)),
            status=Status.FINISHED,
            seed=member,
            reward=float(member) if rewards is None else rewards[member],
        )

    members = tuple(trajectory(member, text) for member, text in enumerate(completions))
    return Group(seq, Prompt(f"prompt {seq}", (Message("user", prompt),), fields or {}), members, admitted_version=0)
