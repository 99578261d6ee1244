"""The teacher of on-policy distillation: a model beside a replica's engine, in its process, whose weights never change.

It is asked for the log-probability of every token of a trajectory once that has ended, by a prefill. If it breaks, its replica does: others
roll what that one had, and a replacement brings its own teacher.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from verst.algorithms.losses import TEACHER
from verst.errors import EngineFailure, ModelError
from verst.fields import PerToken
from verst.protocols import Engine
from verst.types import Group, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 3


class Teacher:
    """Gives each trajectory the field `TEACHER`. `engine`: of the teacher's model, not yet started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def start(self) -> None:
        """Raises `ModelError` if the model cannot be loaded."""
        try:
            await self._engine.start()
        except ModelError as error:
            raise ModelError(f"algorithm.teacher: {str(error).removeprefix('model.path: ')}") from error

    async def judge(self, group: Group) -> Group:
        """The group with the teacher's log-probabilities of each generated token, at temperature 1.

        A trajectory with a token that the teacher holds for impossible has failed: its divergence is infinite. Raises `EngineFailure` if
        the teacher broke.
        """
        begun = time.perf_counter()
        asked = [asyncio.ensure_future(self._judged(trajectory)) for trajectory in group.trainable]
        try:
            judged = {trajectory.id: trajectory for trajectory in await asyncio.gather(*asked)}
        finally:
            for asking in asked:
                asking.cancel()
        trajectories = tuple(judged.get(trajectory.id, trajectory) for trajectory in group.trajectories)
        return replace(group, trajectories=trajectories, timings={**group.timings, "teacher_s": time.perf_counter() - begun})

    async def _judged(self, trajectory: Trajectory) -> Trajectory:
        if TEACHER in trajectory.fields:
            return trajectory.failed(f"its environment gives a field {TEACHER!r}, which is that of algorithm distill: name it otherwise")
        found = []
        for one in trajectory.sequences:
            try:
                logprobs_T = await self._engine.logprobs(one.tokens_T)
            except EngineFailure as failure:
                raise EngineFailure(f"the teacher failed: {failure}") from failure
            found.append(logprobs_T[one.loss_mask_T])
        values = np.concatenate(found)
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            token = int(np.concatenate([one.tokens_T[one.loss_mask_T] for one in trajectory.sequences])[place])
            return trajectory.failed(f"the teacher gives its generated token {place} ({token}) the log-probability {values[place]}")
        return replace(trajectory, fields={**trajectory.fields, TEACHER: PerToken(values)})

    async def check(self) -> None:
        """Raises `EngineFailure` if the teacher is broken for good."""
        await self._engine.check()

    async def close(self) -> None:
        await self._engine.close()


def require_same_tokens(own: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase, path: str) -> None:
    """Raises `ModelError` unless both tokenizers have the same tokens under the same ids: the teacher is asked about ids."""
    ours, theirs = own.get_vocab(), teachers.get_vocab()
    if ours == theirs:
        return
    other = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ModelError(
        f"algorithm.teacher {path}: its tokenizer is not the policy's: {len(ours)} and {len(theirs)} tokens, of which {len(other)} differ "
        f"({_named(other)}). A teacher of the same family has the same tokenizer"
    )


def _named(tokens: Sequence[str]) -> str:
    shown = ", ".join(repr(token) for token in tokens[:_SHOWN])
    return f"{shown} …" if len(tokens) > _SHOWN else shown
