"""The key-value cache: one fixed row of memory, a slot, for each running sequence, in every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache


class SlotCache(Cache):
    """Keys and values `[slots, kv_heads, columns, dim]` per layer, allocated when a layer first writes.

    `aim_prefill` or `aim_decode` says where the next forward pass writes. Position `max_tokens` of a slot is scrap: rows without a
    sequence write there, so that a step can run on all rows and still leave the content of free slots alone.
    """

    def __init__(self, slots: int, max_tokens: int, multiple: int = 1) -> None:
        """`multiple`: prompts are filled up to one of these."""
        super().__init__(layers=[])
        self._slots = slots
        self.scrap = max_tokens  # the position where rows without a sequence write
        self.columns = _round_up(max_tokens + 1, math.lcm(64, multiple))  # all rows aligned alike, or their last bits may differ
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._prefill_slot: torch.Tensor | None = None
        self._all_rows = self._positions = torch.empty(0, dtype=torch.long)

    def aim_prefill(self, slot: torch.Tensor) -> None:
        """The next forward pass is one prompt, to be kept in `slot` `[1]` from position 0."""
        self._prefill_slot = slot

    def aim_decode(self, positions_R: torch.Tensor) -> None:
        """The next forward pass is one token for each of the first R slots, to be kept at these positions."""
        self._prefill_slot = None
        self._positions = positions_R
        if not len(self._all_rows):  # made once: what a CUDA graph has read must stay in place
            self._all_rows = torch.arange(self._slots, device=positions_R.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps new keys and values; returns the prompt's own at a prefill, else those of the first R slots, scrap included."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._allocate(key_states), self._allocate(value_states))
        keys, values = self._layers[layer_idx]
        if self._prefill_slot is not None:
            keys[:, :, : key_states.shape[2]].index_copy_(0, self._prefill_slot, key_states)
            values[:, :, : value_states.shape[2]].index_copy_(0, self._prefill_slot, value_states)
            return key_states, value_states
        count = len(self._positions)
        keys[self._all_rows[:count], :, self._positions] = key_states[:, :, 0]
        values[self._all_rows[:count], :, self._positions] = value_states[:, :, 0]
        return keys[:count], values[:count]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given to the model, which then has no need to ask."""
        return 0

    def release(self) -> None:
        """Gives up all memory, and with it the content of every slot. It is taken again when a layer next writes."""
        self._layers.clear()

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies the first `length` positions of slots to others, bit for bit. All are read before the first is written."""
        device = self._all_rows.device
        read, written = (torch.tensor(slots, device=device) for slots in (sources, targets))
        for keys, values in self._layers.values():
            keys[written, :, :length] = keys[read, :, :length]
            values[written, :, :length] = values[read, :, :length]

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self._slots, states.shape[1], self.columns, states.shape[3])
        if states.device.type != "cpu":
            return torch.zeros(shape, dtype=states.dtype, device=states.device)
        # NumPy's zeros are pages that the system hands out when they are first written, so memory follows the sequences' real
        # lengths, not the limit; torch.zeros writes all of it at once.
        return torch.from_numpy(np.zeros((*shape[:3], shape[3] * states.element_size()), np.uint8)).view(states.dtype)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
