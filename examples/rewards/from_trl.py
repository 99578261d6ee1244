"""Two reward functions as TRL's documentation has them: `reward.function: trl:from_trl:correct+from_trl:brief`."""

from __future__ import annotations

from typing import Any


def correct(completions: list[list[dict[str, str]]], answer: list[str], **kwargs: Any) -> list[float | None]:
    """1 if the last word is the answer; says nothing of prompts without one."""
    texts = [completion[0]["content"] for completion in completions]
    return [None if a is None else float(text.split()[-1:] == [a]) for text, a in zip(texts, answer, strict=True)]


async def brief(prompts: list[Any], completion_ids: list[list[int]], trainer_state: Any, log_metric: Any, **kwargs: Any) -> list[float]:
    """Up to 1 for few tokens; asked for from step 100 on."""
    lengths = [len(ids) for ids in completion_ids]
    log_metric("tokens", sum(lengths) / len(lengths))
    return [0.0 if trainer_state.global_step < 100 else 1 / (1 + length) for length in lengths]
