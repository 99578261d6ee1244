"""Fields of the samples in a microbatch, as a loss gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verst.fields import Field, Opaque, PerSample, PerToken
from verst.training.microbatch import Microbatch
from verst.types import Sample


class _Fields(dict[str, Any]):
    """What a loss asks for in vain is told by name."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"no sample of this batch has a field {name!r}; they have: {', '.join(self) or 'none'}")


def loss_fields(
    samples: Sequence[Sample], kinds: Mapping[str, type[Field]], microbatch: Microbatch, device: torch.device
) -> Mapping[str, Any]:
    """See `LossInputs.fields`. `samples` and `kinds` are of the whole batch, so that every rank and microbatch has the same names."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        if kind is Opaque:
            found[name] = [own.value if isinstance(own := sample.fields.get(name), Opaque) else None for sample in samples]
            continue
        parts = [_numbers(samples[i].fields.get(name), count) for i, count in zip(microbatch.indices, microbatch.counts, strict=True)]
        found[name] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts])).to(device)
    return _Fields(found)


def _numbers(value: Field | None, count: int) -> NDArray[np.float32]:
    if isinstance(value, PerToken):
        return value.values
    return np.full(count, value.value if isinstance(value, PerSample) else np.nan, np.float32)
