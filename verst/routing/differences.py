"""How the trainer's own routes differ from the recorded ones: what every backend tells of it.

A backend calls `tally_routes` once for each microbatch of a step, in the first pass over it, which is the pass that measures the mismatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from verst.errors import InvariantViolation
from verst.observe.metrics import Tally
from verst.routing.records import expert_dtype
from verst.types import NO_VERSION, RoutedExperts

GIVEN = -1
"""The age of a row whose next token nobody sampled."""
_OLDER = 4  # steps; ages from here on are told together


def row_ages(versions_T: NDArray[np.int32], version: int) -> NDArray[np.int64]:
    """[T − 1] for each row of a sample's routes: how many steps older than `version` is the token that it led to, or `GIVEN`."""
    next_T = versions_T[1:].astype(np.int64)
    return np.where(next_T == NO_VERSION, GIVEN, version - next_T)


def tally_routes(
    tally: Tally,
    kind: RoutedExperts,
    layers: Sequence[int],
    *,
    live_NLK: torch.Tensor,
    used_NLK: torch.Tensor,
    recorded_NLK: torch.Tensor,
    ages_N: NDArray[np.int64],
) -> None:
    """Adds what one pass over N tokens (no padding among them) says of routes. All three ids [N, L, K], of any integer type, on one device.

    `live_NLK` are the experts that the trainer's router would have chosen, `used_NLK` those that it handed on to be computed (the recorded
    ones in replay, else the live ones). `layers` names the L layers, counted among all that route; a rank that has only some gives those.
    `ages_N` comes from `row_ages`. Rows hold sets: the order of the experts of a token does not count.

    - `routes/differ`: share of (token, layer) whose live set is not the recorded one; also for each layer (`/layer_3`) and, of the rows
      that led to a sampled token, for each age (`/age_0` to `/age_3`, `/age_older`)
    - `routes/replayed`: share of (token, layer) whose used set is the recorded one
    - `routes/bytes_per_token`: what the record of a token takes, all layers of the model together

    Merged over microbatches and ranks the tally stays exact. Ranks that hold the same tokens and layers must not all be merged.
    Raises `InvariantViolation` if the shapes do not fit.
    """
    shape = (len(ages_N), len(layers), kind.chosen)
    shapes = {tuple(ids.shape) for ids in (live_NLK, used_NLK, recorded_NLK)}
    if shapes != {shape}:
        raise InvariantViolation(f"routes: expert ids of shapes {sorted(map(list, shapes))} to compare, not {list(shape)}")
    if not recorded_NLK.numel():
        return
    recorded = _sorted(recorded_NLK)
    differ = (_sorted(live_NLK) != recorded).any(-1)
    missed = (_sorted(used_NLK) != recorded).any(-1)
    differ_NL, missed_NL = torch.stack((differ, missed)).cpu().numpy()  # the only copy from the device
    tally.mean("routes/differ", differ_NL.sum(), differ_NL.size)
    tally.mean("routes/replayed", (~missed_NL).sum(), missed_NL.size)
    tally.mean("routes/bytes_per_token", len(ages_N) * kind.layers * kind.chosen * expert_dtype(kind.experts).itemsize, len(ages_N))
    for layer, differ_N in zip(layers, differ_NL.T, strict=True):
        tally.mean(f"routes/differ/layer_{layer}", differ_N.sum(), differ_N.size)
    for age in np.unique(np.minimum(ages_N[ages_N != GIVEN], _OLDER)):
        rows_NL = differ_NL[np.minimum(ages_N, _OLDER) == age]
        tally.mean(f"routes/differ/age_{'older' if age == _OLDER else age}", rows_NL.sum(), rows_NL.size)


def _sorted(ids_NLK: torch.Tensor) -> torch.Tensor:
    return ids_NLK.to(torch.int32).sort(dim=-1).values
