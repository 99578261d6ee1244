"""A rollout function of one's own: `rollout: {environment: "rollout:budget:think", max_turns: 2}`, started in this directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verst.rollout.tokens import TokenSession
from verst.types import FinishReason, Prompt


async def think(session: TokenSession, prompt: Prompt, thought: int = 64, then: str = "\nThe answer: ") -> Mapping[str, Any]:
    """Lets the policy think for so many tokens; if it has not come to an end by then, has it answer."""
    first = await session.generate(session.opening(prompt.messages), max_new_tokens=thought)
    if first.finish is not FinishReason.LENGTH:
        return {"cut": False}
    await session.generate([*session.tokens, *session.encode(then)])
    return {"cut": True}
