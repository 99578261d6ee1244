"""Recorded expert routes in the `fsdp` backend: laid beside the padded tokens of a microbatch, replayed, and compared with live ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verst.observe.metrics import Tally
from verst.routing.differences import row_ages, tally_routes
from verst.routing.records import expert_dtype, require_routes
from verst.routing.tap import RoutingTap
from verst.training.microbatch import Microbatch
from verst.training.step import LoadedStep
from verst.types import RoutedExperts


@dataclass(frozen=True, slots=True)
class PaddedRoutes:
    """Routes of the B · W padded tokens of a microbatch, on its device."""

    experts_NLK: torch.Tensor
    """uint8 or int16; where nothing is recorded, padding included, any experts that differ."""
    free_N: torch.Tensor | None
    """Tokens of samples without routes, which nobody sampled; None if there are none."""
    known_N: NDArray[np.int64]
    """Places of the tokens whose routes are recorded."""
    ages_N: NDArray[np.int64]
    """Of those tokens; see `verst.routing.differences.row_ages`."""


class PolicyRoutes:
    """Replays the routes of this rank's samples in its policy, or only compares them with the policy's own."""

    def __init__(self, tap: RoutingTap, *, replays: bool) -> None:
        self._tap, self._replays = tap, replays

    def require(self, step: LoadedStep) -> None:
        """Raises `RoutesRefused` if a sample that this rank computes has routes missing, or not its own."""
        for update in step.plan.updates:
            for i in (i for microbatch in update.ranks[step.rank] for i in microbatch):
                require_routes(step.batch.samples[i], self._tap.kind)

    @contextmanager
    def during(self, step: LoadedStep, microbatch: Microbatch, tally: Tally | None) -> Iterator[None]:
        """Around the forward pass of the microbatch, and its backward pass if there is one. A `tally` is told how the routes differ."""
        padded = lay_out(step, microbatch, self._tap.kind)
        with self._tap.replaying(padded.experts_NLK, padded.free_N) if self._replays else self._tap.recording() as choices:
            yield
            if tally is None or not len(padded.known_N):
                return
            known_N = torch.from_numpy(padded.known_N).to(padded.experts_NLK.device)
            tally_routes(
                tally,
                self._tap.kind,
                range(self._tap.kind.layers),
                live_NLK=choices.live()[known_N],
                used_NLK=choices.used()[known_N],
                recorded_NLK=padded.experts_NLK[known_N],
                ages_N=padded.ages_N,
            )


def lay_out(step: LoadedStep, microbatch: Microbatch, kind: RoutedExperts) -> PaddedRoutes:
    """The routes of a microbatch's samples, in the places of their tokens in the flattened `tokens_BT`."""
    rows, width = microbatch.tokens_BT.shape
    experts_NLK = np.empty((rows * width, kind.layers, kind.chosen), expert_dtype(kind.experts))
    experts_NLK[:] = np.arange(kind.chosen)
    free_N, ages_N = np.zeros(rows * width, np.bool_), np.zeros(rows * width, np.int64)
    known: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for row, index in enumerate(microbatch.indices):
        sample = step.batch.samples[index]
        span = slice(row * width, row * width + len(sample.tokens_T) - 1)
        if sample.routes is None:
            free_N[span] = True
            continue
        experts_NLK[span], ages_N[span] = sample.routes.experts_TLK, row_ages(sample.versions_T, step.version)
        known.append(np.arange(span.start, span.stop))
    known_N, device = np.concatenate(known), microbatch.tokens_BT.device
    free = torch.from_numpy(free_N).to(device) if free_N.any() else None
    return PaddedRoutes(torch.from_numpy(experts_NLK).to(device), free, known_N, ages_N[known_N])
