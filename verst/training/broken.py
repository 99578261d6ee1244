"""What an update that is not finite came from: samples, ranks and tensors. Looked for only once there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from verst.algorithms.losses import LossInputs
from verst.training.distributed import all_ranks, local_part
from verst.training.microbatch import Microbatch
from verst.training.model import named
from verst.types import Sample

Value = TypeVar("Value")

_SHOWN = 3
"""Samples that a line names."""


def broken_samples(samples: Sequence[Sample], microbatch: Microbatch, inputs: LossInputs, per_token_N: torch.Tensor) -> list[str]:
    """Of a microbatch: each sample with a token whose loss or one of its inputs is not finite, and which inputs."""
    given: dict[str, torch.Tensor | None] = {
        "the trainer's log-probability": inputs.logprobs.detach(),
        "the sampled log-probability": inputs.behaviour_logprobs,
        "the advantage": inputs.advantages,
        "the reference's log-probability": inputs.reference_logprobs,
    }
    ok = {what: torch.isfinite(values).cpu().numpy() for what, values in given.items() if values is not None}
    finite_N = np.logical_and.reduce([torch.isfinite(per_token_N.detach()).cpu().numpy(), *ok.values()])
    of_token = microbatch.sample_of_token()
    fields = {f"field {name!r}": values for name, values in inputs.fields.items() if isinstance(values, torch.Tensor)}
    lines = []
    for index in dict.fromkeys(of_token[~finite_N].tolist()):
        own = of_token == index
        causes = [what for what, finite in ok.items() if not finite[own].all()]
        if not causes:  # NaN where it was not given is no fault in itself
            broken_N = torch.from_numpy(~finite_N & own)
            causes = [what for what, values in fields.items() if not torch.isfinite(values.cpu()[broken_N]).all()]
        cause = f"{' and '.join(causes)} is not finite" if causes else "the loss overflows"
        lines.append(f"sample {samples[index].id}, {int((~finite_N & own).sum())} of {int(own.sum())} tokens: {cause}")
    return lines or ["the sum over tokens overflows, each is finite"]


def first_broken(gradients: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first tensor that has a NaN or an infinity, and how many."""
    for name, gradient in gradients:
        values = local_part(gradient.detach())
        count = values.numel() - int(torch.isfinite(values).sum())
        if count:
            return f"{name} ({count} of {values.numel()} elements)"
    return None


@dataclass(frozen=True)
class Findings:
    """Of one rank: its samples that are not finite, and its first gradient that is not."""

    samples: Sequence[str]
    gradient: str | None


def attributed(own: Findings) -> str:
    """One line about all ranks, the same on each. A collective."""
    told = all_ranks(own)
    parts = [f"{who}: {named(lines, _SHOWN)}" for who, lines in _by_ranks([tuple(found.samples) for found in told]).items() if lines]
    first = [f"{gradient} on {who}" for who, gradient in _by_ranks([found.gradient for found in told]).items() if gradient]
    parts.append(
        f"the first gradient that is not finite: {named(first, _SHOWN)}" if first else "each gradient is finite, their norm overflows"
    )
    return "; ".join(parts)


def _by_ranks(values: Sequence[Value]) -> dict[str, Value]:
    """Ranks that say the same are named together."""
    ranks: dict[Value, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return {f"trainer rank{'s' * (len(r) > 1)} {named(r)}": value for value, r in ranks.items()}
