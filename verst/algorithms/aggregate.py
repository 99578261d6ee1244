"""How the losses of tokens become the loss of an update: as one weighted sum, whose weights are known before anything is split.

Dividing inside a microbatch and averaging the results gives short microbatches too much weight (the error that several frameworks
shipped for years). Here a token's weight depends on the update alone, so Σ weight · loss is the same for every division into
microbatches and ranks. Gradients of ranks must therefore be summed, never averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from verst.errors import InvariantViolation

Mode = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    loss_masks: Sequence[NDArray[np.bool_]], trajectories: Iterable[int], mode: Mode, limit_tokens: int
) -> list[NDArray[np.float32]]:
    """Weights [T] of each sequence's tokens, from the loss masks [T] of all sequences of one update, on all ranks.

    `trajectories` numbers what each sequence belongs to: the sequences of a trajectory with branches weigh as one.

    - `token_mean`: 1 / loss tokens of the update (DAPO, arXiv 2503.14476, eq. 8)
    - `sequence_mean`: 1 / (trajectories × loss tokens of this one) (GRPO, arXiv 2402.03300, eq. 3)
    - `constant`: 1 / (trajectories × `limit_tokens`), the most that one can have (Dr. GRPO, arXiv 2503.20783, its masked mean)

    A trajectory without loss tokens has no mean to take part with, so it does not count. Tokens outside the mask weigh 0. The weights of
    an update sum to 1, with `constant` to the mean length over the limit, and to 0 if it has no loss token at all.

    Raises `InvariantViolation` if a first token is in its mask: nothing precedes it, so no model predicts it.
    """
    for index, mask in enumerate(loss_masks):
        if len(mask) and mask[0]:
            raise InvariantViolation(
                f"sequence {index} of the update has its first token in the loss mask: no log-probability exists for it"
            )
    owners, tokens = list(trajectories), Counter[int]()
    for mask, owner in zip(loss_masks, owners, strict=True):
        tokens[owner] += int(mask.sum())
    total, count = tokens.total(), sum(own > 0 for own in tokens.values())
    weights = []
    for mask, owner in zip(loss_masks, owners, strict=True):
        divisor = {"token_mean": total, "sequence_mean": count * tokens[owner], "constant": count * limit_tokens}[mode]
        weights.append(np.where(mask, 1.0 / max(divisor, 1), 0.0).astype(np.float32))
    return weights
