"""What the tests of fields share: batches whose samples have fields, a loss that reads them, and what it saw of each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.unit.fsdp_cases import make_batch, make_config
from verst.algorithms.losses import LossInputs
from verst.config.schema import Config
from verst.fields import Opaque, PerSample, PerToken
from verst.protocols import TrainBackend
from verst.types import Batch

SEEN: list[tuple[str, Any, Any]] = []
"""(name, sample, what the loss saw of it), of all microbatches."""


def seeing_loss(inputs: LossInputs) -> torch.Tensor:
    """Weighs each token by its field, or by 1; keeps what it sees in `SEEN`."""
    for name, values in inputs.fields.items():
        for sample in inputs.samples.unique().tolist():
            opaque = isinstance(values, list)
            SEEN.append((name, sample, values[sample] if opaque else values[inputs.samples == sample].cpu().numpy().tobytes()))
    return -torch.nan_to_num(inputs.fields["weight"], nan=1.0) * inputs.fields["share"] * inputs.logprobs


def with_fields(batch: Batch) -> Batch:
    """`weight` is PerToken, of all samples but each third; `share` PerSample, of all; `note` Opaque, of each second."""
    rng = np.random.default_rng(batch.step)
    samples = []
    for index, sample in enumerate(batch.samples):
        fields: dict[str, Any] = {"share": PerSample(float(rng.random()))}
        if index % 3:
            fields["weight"] = PerToken(rng.normal(size=int(sample.loss_mask_T.sum())))
        if index % 2:
            fields["note"] = Opaque({"sample": index, "of": ["two", None]})
        samples.append(replace(sample, fields=fields))
    return replace(batch, samples=tuple(samples))


def fields_batch(step: int) -> Batch:
    return with_fields(make_batch(step, groups=3, longest=20))


def fields_config(path: str, **train: Any) -> Config:
    loss = f"{__name__}:seeing_loss"
    return make_config(path, train={"lr": 1e-3, "microbatch_tokens": 40, **train}, algorithm={"name": "grpo", "loss": loss})


def expected(batch: Batch) -> dict[tuple[str, int], Any]:
    """What a loss must see of each sample."""
    found: dict[tuple[str, int], Any] = {}
    for index, sample in enumerate(batch.samples):
        tokens = int(sample.loss_mask_T.sum())
        weight, share, note = (sample.fields.get(name) for name in ("weight", "share", "note"))
        missing = np.full(tokens, np.nan, np.float32)
        found["weight", index] = (weight.values if isinstance(weight, PerToken) else missing).tobytes()
        assert isinstance(share, PerSample)
        found["share", index] = np.full(tokens, share.value, np.float32).tobytes()
        found["note", index] = note.value if isinstance(note, Opaque) else None
    return found


def run_steps(backend: TrainBackend, batches: Sequence[Batch]) -> tuple[list[list[tuple[str, Any, Any]]], Mapping[str, torch.Tensor]]:
    """What the loss saw in each step, and the weights in the end."""
    seen = []
    for batch in batches:
        SEEN.clear()
        backend.load_batch(batch)
        for update in range(backend.num_updates):
            backend.forward_backward(update, [1.0] * len(batch.samples))
            backend.optimizer_step(update)
        seen.append(list(SEEN))
    return seen, {name: tensor.cpu().clone() for name, tensor in backend.weights()}
