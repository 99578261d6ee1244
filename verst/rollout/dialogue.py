"""The conversation of one trajectory whose environment answers the policy, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import DataError, EnvironmentFailure
from verst.fields import apart
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.policy import Opening, Policy
from verst.rollout.tokens import Asked, Ended
from verst.rollout.transcript import Transcript
from verst.types import Completion, FinishReason, Prompt, Reply, Status, Trajectory


class Dialogue:
    """Asks in turn the policy and the environment.

    Args:
        max_turns: completions that it may have.
        opening: gives the tokens of what the environment begins with, and of its tools, or raises if they cannot be answered.
    """

    def __init__(self, environment: GuardedEnvironment, prompt: Prompt, policy: Policy, max_turns: int, opening: Opening) -> None:
        self._environment, self._prompt, self._policy = environment, prompt, policy
        self._max_turns, self._opening = max_turns, opening
        self._transcript = Transcript()

    @property
    def generated(self) -> int:
        """Tokens that were sampled so far."""
        return self._transcript.generated

    async def roll(self) -> Status:
        """Turns until the environment or a limit ends it. Raises `EnvironmentFailure`, `Cut`, and what an engine raises."""
        status = await self._converse()
        self._transcript.require_trained()
        self._transcript.fields.require_whole(self.generated, f"environment {self._environment.name}")
        return status

    async def close(self) -> EnvironmentFailure | None:
        """Repeating it changes nothing. A failure is returned, so that it hides no other error."""
        return await self._environment.close()

    def trajectory(self, status: Status) -> Trajectory:
        return self._transcript.trajectory(self._policy.name, status, self._policy.seed)

    async def _converse(self) -> Status:
        environment, policy, transcript = self._environment, self._policy, self._transcript
        policy.waits_for(f"environment {environment.name} to start")
        opening = await policy.race.unless_over(environment.start(self._prompt))
        asked, tools = opening if isinstance(opening, Asked) else None, await environment.tools()
        transcript.give(self._opening(opening, tools), self._prompt.messages if isinstance(opening, Asked) else opening)
        for turn in range(self._max_turns):
            completion = await policy.turn(turn, transcript, asked)
            # A truncated completion is shown to the environment too: the reward may need what it has to say.
            policy.waits_for(f"environment {environment.name} to reply")
            reply = await policy.race.unless_over(environment.reply(completion))
            self._take(reply)
            asked = reply if isinstance(reply, Asked) else None
            if reply.done or (completion.finish is FinishReason.LENGTH and asked is None):
                return _status(reply, completion.finish)
            if turn + 1 == self._max_turns:
                break
            if not policy.renderer.may_fit(reply.messages, policy.max_model_tokens - transcript.length):
                break
            given_T = self._behind(completion, reply, tools)
            if transcript.length + len(given_T) >= policy.max_model_tokens:  # no room for a single generated token
                break
            transcript.give(given_T, reply.messages)
        return Status.TRUNCATED

    def _take(self, reply: Reply) -> None:
        """What a reply says beside its messages."""
        transcript = self._transcript
        if isinstance(reply, Asked | Ended):
            transcript.exclude(reply.excluded)
        plain, fields = apart(reply.info)
        transcript.info.update(plain)
        transcript.fields.take(fields, transcript.generated, f"{self._environment.name}.reply")

    def _behind(self, completion: Completion, reply: Reply, tools: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        """What a reply puts between the completion and the next one."""
        if isinstance(reply, Asked):
            return np.asarray(reply.tokens, np.int32)
        try:
            return self._policy.renderer.continuation(reply.messages, last=completion.tokens[-1], tools=tools)
        except DataError as error:  # the messages are the environment's
            raise EnvironmentFailure(f"the environment's reply cannot be rendered: {error}") from error


def _status(reply: Reply, finish: FinishReason) -> Status:
    """Of a trajectory that a reply or the limit of a generation ended."""
    truncated = reply.truncated if isinstance(reply, Ended) else None
    if truncated is None:
        truncated = finish is FinishReason.LENGTH
    return Status.TRUNCATED if truncated else Status.FINISHED
