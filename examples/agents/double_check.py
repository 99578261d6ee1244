"""An agent that knows only a base URL and a key: `rollout.environment: agent:double_check:solve`, `rollout.max_turns: 2`, started here."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

from verst.rollout.sessions import Session
from verst.types import Prompt


async def solve(session: Session, prompt: Prompt, question: str = "Are you sure? Answer once more.") -> dict[str, Any]:
    """Asks, then asks for a second answer. What it returns is the trajectory's `info`, which the reward sees."""
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        messages: list[Any] = [{"role": m.role, "content": m.content} for m in prompt.messages]
        answers = []
        for _ in range(2):
            reply = await client.chat.completions.create(model="policy", messages=messages)
            answers.append(reply.choices[0].message.content)
            messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": question}]
    return {"changed": answers[0] != answers[1]}
