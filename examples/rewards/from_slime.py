"""A custom reward function of slime: `reward.function: slime:from_slime:rm`, with `reward.options: {reward_key: score, penalty: 0.1}`."""

from __future__ import annotations

from typing import Any

from slime.utils.types import Sample  # pyright: ignore[reportMissingImports] - need not be installed


async def rm(args: Any, sample: Sample, **kwargs: Any) -> dict[str, float]:
    """1 for the label, less a penalty for an answer that was cut."""
    correct = float(sample.response.strip() == sample.label)
    cut = sample.status == Sample.Status.TRUNCATED
    return {"score": correct - args.penalty * cut, "correct": correct, "tokens": float(sample.response_length)}
