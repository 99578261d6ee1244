"""User code of every kind that looks for keys in the environment of the process that it runs in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from verst.algorithms.losses import LossOutput
from verst.rollout.environments import SingleTurn
from verst.rollout.sandbox import Sandbox
from verst.types import Completion, Reply

PLANTED = {
    "MY_API_KEY": "planted-1",
    "HF_TOKEN": "planted-2",
    "WANDB_API_KEY": "planted-3",
    "RAY_AUTH_TOKEN": "planted-4-of-32-characters-or-more-x",
}
NAMED = "SEARCH_TOKEN"
CODE = "import os; print(os.environ); print([open(f'/proc/{p}/environ').read() for p in ('self', os.getppid())])"

AT_IMPORT = sorted(name for name in PLANTED if name in os.environ)


def seen() -> list[str]:
    """Planted variables that this process shows, by either way of looking."""
    shown = Path("/proc/self/environ").read_text()
    return sorted({name for name, value in PLANTED.items() if name in os.environ or value in shown} | {*AT_IMPORT})


class Environment(SingleTurn):
    async def reply(self, completion: Completion) -> Reply:
        box = Sandbox(isolated=False)
        printed = (await box.run(CODE)).output
        await box.close()
        of_code = sorted(name for name, value in PLANTED.items() if value in printed)
        return Reply(info={"seen": seen(), "code": of_code, "ran": "LANG" in printed, "named": os.environ.get(NAMED)})


def reward(trajectory: Any, fields: Any) -> float:
    return len(seen()) + len(trajectory.info["seen"]) + 10.0 * (os.environ.get(NAMED) == "named")


def keep(group: Any) -> str | None:
    return None if not seen() and os.environ.get(NAMED) == "named" else f"saw {seen()}"


def loss(inputs: Any) -> LossOutput:
    told = {"seen": float(len(seen())), "named": float(os.environ.get(NAMED) == "named")}
    return LossOutput(-inputs.logprobs * inputs.advantages, {name: torch.full_like(inputs.logprobs, x) for name, x in told.items()})


class Hook:
    def after_step(self, step: int, metrics: Any) -> dict[str, float]:
        return {"seen": float(len(seen())), "named": float(os.environ.get(NAMED) == "named")}
