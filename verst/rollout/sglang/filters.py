"""top-k, top-p and min-p inside SGLang's server, before it samples.

SGLang reports the log-probabilities of the distribution before its filters. A custom logit processor that removes the filtered tokens
itself makes the distribution it samples and the one it reports the same, and the filters are those of the `hf` engine.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verst.rollout.hf.sampling import RowSampling, filtered
from verst.types import Sampling


class SamplingFilter:
    """SGLang calls it with the logits `[rows, vocabulary]` of the requests that ask for it, and the parameters of each."""

    def __call__(self, logits: torch.Tensor, custom_param_list: Sequence[Mapping[str, Any]] | None = None) -> torch.Tensor:
        """The logits, with -inf for the tokens that the filters remove."""
        settings = custom_param_list or []

        def column(name: str, dtype: Any) -> Any:
            return np.array([row[name] for row in settings], dtype)

        rows = RowSampling.of(
            column("temperature", np.float32),
            column("top_p", np.float32),
            column("top_k", np.int64),
            column("min_p", np.float32),
            logits.device,
        )
        kept = filtered(logits.float() * rows.factor, rows)
        return logits.masked_fill(kept == -torch.inf, -torch.inf)


def request_fields(sampling: Sampling) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request needs so that the server filters for it: top-level fields, and `custom_params` of its sampling parameters."""
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    return {"custom_logit_processor": _PROCESSOR}, settings


def filters(sampling: Sampling) -> bool:
    """Whether any filter is on. A greedy request takes the likeliest token, which no filter removes."""
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)


_PROCESSOR = json.dumps({"callable": pickle.dumps(SamplingFilter).hex()})  # as SGLang's CustomLogitProcessor.to_str: a name, no code
