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


def token_weights(loss_masks: Sequence[NDArray[np.bool_]], mode: Literal["token_mean", "sequence_mean"]) -> list[NDArray[np.float32]]:
    """Weights [T] of each sequence's tokens, from the loss masks [T] of all sequences of one update, on all ranks.

    `token_mean`: 1 / loss tokens of the update. `sequence_mean`: 1 / (sequences with loss tokens × loss tokens of this sequence);
    a sequence without any has no mean to take part with, so it does not count. Tokens outside the mask weigh 0, and the
    weights of an update sum to 1, or to 0 if it has no loss token at all.

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
        share = total if mode == "token_mean" else sequences * count
        weights.append(np.where(mask, 1.0 / max(share, 1), 0.0).astype(np.float32))
    return weights
