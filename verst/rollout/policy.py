"""The policy as one trajectory asks it: a turn is generated behind a transcript, exact to the token, however many requests it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.data.chat import ChatRenderer
from verst.observe.waits import Waits
from verst.protocols import Engine
from verst.rollout.boundary import checked_experts, checked_generation
from verst.rollout.race import Cut, Race
from verst.rollout.tokens import Asked
from verst.rollout.transcript import Transcript
from verst.types import Completion, FinishReason, GenerateRequest, Message, Sampling

Opening = Callable[[Asked | Sequence[Message], Sequence[Mapping[str, Any]]], NDArray[np.int32]]
"""The tokens that a trajectory begins with, from messages or tokens, and tools (`GroupRoller.opening`)."""


def stable_seed(*parts: int) -> int:
    """A seed in [0, 2^63) that is the same in every process and on every machine, unlike Python's `hash`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Policy:
    """Answers in one trajectory.

    Args:
        engine_name: what messages call the engine.
        max_model_tokens: limit of a whole conversation.
        race: the group's, which the requests go through.
        name: the trajectory's, `GROUP/MEMBER`.
        seed: the trajectory's.
        waits: where the trajectory says what it waits for.
    """

    engine: Engine
    engine_name: str
    renderer: ChatRenderer
    sampling: Sampling
    max_model_tokens: int
    race: Race
    name: str
    seed: int
    waits: Waits

    def waits_for(self, what: str) -> None:
        self.waits.begin(self.name, what)

    async def turn(self, number: int, transcript: Transcript, asked: Asked | None = None) -> Completion:
        """Generates and ends the open turn of a transcript. `number`: of the turn in the trajectory, which fixes its seed.

        `asked`: what a rollout function wants otherwise than the run.
        """
        self.waits_for(self.engine_name)
        finish = await self._generate(number, transcript, asked)
        tokens_T, logprobs_T = transcript.turn()
        text = self.renderer.decode(tokens_T, self.sampling.stop_token_ids)
        transcript.end_turn(text, finish)
        return Completion(text, tuple(tokens_T.tolist()), finish, tuple(logprobs_T.tolist()))

    async def _generate(self, number: int, transcript: Transcript, asked: Asked | None) -> FinishReason:
        """After an abort from outside it goes on from the tokens so far."""
        limit, stop = self.sampling.max_new_tokens, self.sampling.stop
        if asked is not None:
            limit, stop = asked.max_new_tokens or limit, stop if asked.stop is None else asked.stop
        left = min(limit, self.max_model_tokens - transcript.length)
        stop_ids = tuple(dict.fromkeys((*self.sampling.stop_token_ids, *self.renderer.stop_token_ids)))
        drawn_by = stable_seed(stable_seed(self.seed, number), 0)  # a turn is one draw, however many requests it takes
        piece = 0
        while left:
            sampling = replace(self.sampling, max_new_tokens=left, stop=stop, stop_token_ids=stop_ids)
            request_id = f"{self.name}/{number}+{piece}" if piece else f"{self.name}/{number}"
            routed = self.engine.routed_experts
            routes_from = None if routed is None else transcript.routed
            request = GenerateRequest(request_id, transcript.tokens(), sampling, drawn_by, routes_from)
            generation = checked_generation(await self.race.generate(request), request)
            transcript.generate(generation)
            if self.race.is_cut(generation):
                raise Cut
            if routed is not None:
                transcript.route(checked_experts(generation, request, routed))
            if generation.finish is not FinishReason.ABORT:
                return generation.finish
            left -= len(generation.tokens_T)
            piece += 1
        return FinishReason.LENGTH
