"""How the losses of tokens become the loss of an update: as one weighted sum, whose weights are known before anything is split.

Dividing inside a microbatch and averaging the results gives short microbatches too much weight (the error that several frameworks
shipped for years). Here a token's weight depends on the update alone, so Σ weight · loss is the same for every division into
microbatches and ranks. Gradients of ranks must therefore be summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from verst.errors import InvariantViolation

Mode = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(loss_masks: Sequence[NDArray[np.bool_]], mode: Mode, limit_tokens: int) -> list[NDArray[np.float32]]:
    """Weights [T] of each sequence's tokens, from the loss masks [T] of all sequences of one update, on all ranks.

    - `token_mean`: 1 / loss tokens of the update (DAPO, arXiv 2503.14476, eq. 8)
    - `sequence_mean`: 1 / (sequences × loss tokens of this one) (GRPO, arXiv 2402.03300, eq. 3)
    - `constant`: 1 / (sequences × `limit_tokens`), the most that one can have (Dr. GRPO, arXiv 2503.20783, its masked mean)

    A sequence without loss tokens has no mean to take part with, so it does not count. Tokens outside the mask weigh 0. The weights of an
    update sum to 1, with `constant` to the mean length over the limit, and to 0 if it has no loss token at all.

    Raises `InvariantViolation` if a first token is in its mask: nothing precedes it, so no model predicts it.
    """
    for index, mask in enumerate(loss_masks):
        if len(mask) and mask[0]:
            raise InvariantViolation(
                f"sequence {index} of the update has its first token in the loss mask: no log-probability exists for it"
            )
    counts = [int(mask.sum()) for mask in loss_masks]
    total, sequences = sum(counts), sum(count > 0 for count in counts)
    weights = []
    for mask, count in zip(loss_masks, counts, strict=True):
        divisor = {"token_mean": total, "sequence_mean": sequences * count, "constant": sequences * limit_tokens}[mode]
        weights.append(np.where(mask, 1.0 / max(divisor, 1), 0.0).astype(np.float32))
    return weights
