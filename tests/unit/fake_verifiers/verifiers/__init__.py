"""What Verst uses of the protocol of verifiers 0.1.10, for machines without it. No more than its tests need."""

from __future__ import annotations

import importlib
from typing import Any

from verifiers.envs.environment import Environment, Error, Rubric, SingleTurnEnv, ToolEnv  # pyright: ignore

__all__ = ["Environment", "Error", "Rubric", "SingleTurnEnv", "ToolEnv", "load_environment"]


def load_environment(env_id: str, **options: Any) -> Environment:
    module = importlib.import_module(env_id.replace("-", "_"))
    made = module.load_environment(**options)
    made.env_id = env_id
    return made
