"""The reward of `vs_trl.py`, as both sides call it. Imports nothing, so that it costs neither of them a start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def share(tokens: Iterable[int]) -> float:
    """The share of a completion's tokens whose id leaves 3 when divided by 4; special tokens have the ids 0 to 2."""
    hits = [token % 4 == 3 for token in tokens]
    return sum(hits) / len(hits)


def of_trajectory(trajectory: Any, fields: Mapping[str, Any]) -> float:
    """As Verst calls a reward: one trajectory, with the tokens that were generated marked in its loss mask."""
    return share(trajectory.tokens_T[trajectory.loss_mask_T].tolist())


def of_batch(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """As TRL calls one: all completions of a step, among much else."""
    return [share(tokens) for tokens in completion_ids]
