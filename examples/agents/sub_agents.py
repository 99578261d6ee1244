"""An agent that has help: `rollout.environment: agent:sub_agents:solve`, `rollout.max_turns: 4`, started here."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from verst.rollout.sessions import Session
from verst.types import Prompt


async def solve(session: Session, prompt: Prompt, helpers: int = 2) -> dict[str, Any]:
    """Plans, has each helper follow the plan in a conversation of its own, and answers with what they found."""
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:

        async def ask(messages: list[Any]) -> str:
            reply = await client.chat.completions.create(model="policy", messages=messages)
            return str(reply.choices[0].message.content)

        task: list[Any] = [{"role": m.role, "content": m.content} for m in prompt.messages]
        plan = await ask(task)
        found = await asyncio.gather(*(ask([{"role": "user", "content": f"You are helper {n + 1}.\n{plan}"}]) for n in range(helpers)))
        notes = {"role": "user", "content": "\n".join(["Your helpers say:", *found, "Answer now."])}
        await ask([*task, {"role": "assistant", "content": plan}, notes])
    return {"agree": len(set(found)) == 1}
