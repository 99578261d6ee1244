"""The routes of the running sequences, on the host: rows come with each pass, and leave with the generation that they belong to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verst.routing.records import expert_dtype
from verst.types import RoutedExperts


class SlotRoutes:
    """Rows of S slots of at most `max_tokens` tokens. They are of the pass that gave the next token, and stay if keys are computed anew."""

    def __init__(self, slots: int, max_tokens: int, kind: RoutedExperts) -> None:
        # The system hands pages out when they are first written, so memory follows the sequences' real lengths.
        self._generated_STLK = np.zeros((slots, max_tokens, kind.layers, kind.chosen), expert_dtype(kind.experts))
        self._prompt_of: list[torch.Tensor | None] = [None] * slots
        self._coming: tuple[NDArray[np.intp], NDArray[np.int64], torch.Tensor] | None = None

    def admit(self, slot: int, prompt_PLK: torch.Tensor) -> None:
        """The slot's sequence begins with a prompt whose tokens were routed so. Sequences may share it, so nobody writes to it."""
        self._prompt_of[slot] = prompt_PLK

    def expect(self, slots: NDArray[np.intp], places: NDArray[np.int64], experts_RLK: torch.Tensor) -> None:
        """A decoding step routed the generated token `places[i]` of `slots[i]` by row `slots[i]`. Read by `settle`."""
        self._coming = (slots, places, on_host(experts_RLK))

    def settle(self) -> None:
        """Keeps what `expect` announced. By now the device must have been waited for."""
        if self._coming is not None:
            slots, places, experts_RLK = self._coming
            self._generated_STLK[slots, places] = experts_RLK.numpy()[slots]
            self._coming = None

    def free(self, slot: int) -> None:
        self._prompt_of[slot] = None

    def rows(self, slot: int, generated: int, routes_from: int) -> NDArray[Any]:
        """The rows of a sequence from token `routes_from` on, without that of its newest token. A copy."""
        prompt_PLK = self._prompt_of[slot]
        assert prompt_PLK is not None
        return np.concatenate((prompt_PLK.numpy(), self._generated_STLK[slot, : generated - 1]))[routes_from:].copy()

    def move(self, source: int, target: int, generated: int) -> None:
        """A sequence with so many generated tokens goes to a free slot."""
        self._prompt_of[target], self._prompt_of[source] = self._prompt_of[source], None
        self._generated_STLK[target, :generated] = self._generated_STLK[source, :generated]


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory, which is whole once the device has been waited for; on a CPU the tensor itself."""
    return tensor.to("cpu", non_blocking=True)
