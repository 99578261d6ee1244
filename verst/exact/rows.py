"""How many rows a CPU needs at once, so that each gets the bits it would get among any others."""

from __future__ import annotations

import math
from typing import Any

import torch

PRODUCT_ROWS = 16
"""Matrix products of a multiple of this give a row the same bits whatever the others are.

Measured with MKL on AVX-512 and one thread, for inner sizes of 16 to 4,096: 4 rows differ from inner size 96 on, 8 rows from 192, 12 rows
from 576, multiples of 16 never. With two threads from inner size 1,024 on, where MKL shares out the inner size, all may differ.
"""
ELEMENTS = 128
"""Elementwise kernels compute blocks of 32 or 64 numbers, and what is left over with other, scalar code, with other last bits. Measured:
with 13 rows of 48 the last row's SiLU differs. Two threads cut a tensor in halves, hence 128."""

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_local_experts", "n_routed_experts")


def row_multiple(config: Any) -> int:
    """Of which the number of tokens in a forward pass of this text config's model has to be a multiple on a CPU."""
    widths = [width for name in _WIDTHS if (width := getattr(config, name, None))]
    if getattr(config, "shared_expert_intermediate_size", None):
        widths.append(1)  # its gate is a sigmoid of one number a row
    return math.lcm(PRODUCT_ROWS, elements_multiple(config.hidden_size // config.num_attention_heads, *widths))


def elements_multiple(*widths: int) -> int:
    """Rows, of all these widths, that fill whole blocks of an elementwise kernel."""
    return ELEMENTS // math.gcd(ELEMENTS, *widths)


def filled(rows_C: torch.Tensor, multiple: int, value: float = 0) -> torch.Tensor:
    """The rows, and rows of one value behind them, up to a multiple."""
    missing = -len(rows_C) % multiple
    return torch.cat((rows_C, rows_C.new_full((missing, *rows_C.shape[1:]), value))) if missing else rows_C
