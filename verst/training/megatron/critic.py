"""The critic of the `megatron` backend: Megatron's model of the same layout as the policy, with the head on the last pipeline stage.

The policy's family has a table of the same tensors but for the head: one row of numbers, which every tensor-parallel rank holds whole.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verst.config.algorithms import PpoConfig
from verst.config.schema import Config
from verst.observe.metrics import Tally
from verst.training.critic import CRITIC, HEAD, Critic
from verst.training.megatron.copies import copies_of, names_of, updated
from verst.training.megatron.files import WeightFiles
from verst.training.megatron.layout import Layout
from verst.training.megatron.model import build_chunks, forward_values
from verst.training.megatron.optimizer import MegatronAdamW
from verst.training.megatron.packed import Packed, in_rounds, pack
from verst.training.megatron.parallel import schedule, transformer_config, wrap
from verst.training.megatron.table.rows import OUTPUT, Family, Row
from verst.training.megatron.tensors import ModelTensors
from verst.training.microbatch import split
from verst.training.rest import unique
from verst.training.step import LoadedStep, PerSample

_HEAD = Row(OUTPUT.megatron, (HEAD,))


class _Files(WeightFiles):
    """A causal language model's files with a head of zeros, or a reward model's with its own."""

    def __init__(self, path: str, where: str, hidden: int) -> None:
        super().__init__(path, where)
        self._zeros = None if HEAD in super().names else torch.zeros(1, hidden)

    @property
    def names(self) -> Mapping[str, int]:
        return super().names if self._zeros is None else {**super().names, HEAD: -1}

    def shape(self, name: str) -> tuple[int, ...]:
        return super().shape(name) if self._zeros is None or name != HEAD else tuple(self._zeros.shape)

    def read(self, name: str) -> torch.Tensor:
        return super().read(name) if self._zeros is None or name != HEAD else self._zeros


class MegatronCritic(Critic[MegatronAdamW]):
    """See `Critic`. `hf_config` and `family` are the policy's: a critic of another architecture is refused, as its tensors do not fit.

    Raises `ModelError`.
    """

    def __init__(  # noqa: PLR0913 (the policy's own)
        self,
        config: Config,
        options: PpoConfig,
        args: argparse.Namespace,
        hf_config: Any,
        family: Family,
        *,
        layout: Layout,
        data_rank: int,
        device: torch.device,
        num_updates: int,
    ) -> None:
        super().__init__(config, options)
        self._layout, self._data_rank, self._device = layout, data_rank, device
        own = copy.copy(hf_config)
        own.tie_word_embeddings = False  # there is no output layer to share them with
        transformer = transformer_config(args)
        chunks = build_chunks(transformer, own, layout.virtual, device, compiled=config.train.compile, values=True)
        files = _Files(self._path, self._where, own.hidden_size)
        self.tensors = ModelTensors(chunks, _with_head(family), own, files)
        self.tensors.load()
        self._chunks = wrap(chunks, transformer, args)
        self.optimizer = MegatronAdamW(args, self._chunks, self._train, num_updates, config.run.steps, **self._names)
        self.optimizer.give_model_its_parameters()

    @property
    def chunks(self) -> Sequence[Any]:
        """In Megatron's data parallelism."""
        return self._chunks

    @property
    def modules(self) -> list[Any]:
        return [chunk.module for chunk in self._chunks]

    @property
    def layers(self) -> list[Any]:
        return [layer for module in self.modules for layer in module.decoder.layers]

    def held(self) -> dict[str, torch.Tensor]:
        tensors = unique(names_of(self.tensors, "weights"), updated(self.optimizer, self.tensors))
        return {f"{CRITIC}{name}": tensor for name, tensor in tensors.items()}

    def copies(self) -> dict[str, tuple[int, str]]:
        """See `verst.training.rest.Held`."""
        return {f"{CRITIC}{name}": (kind, f"{CRITIC}{place}") for name, (kind, place) in copies_of(self.tensors, "weights").items()}

    @torch.no_grad()
    def score(self, step: LoadedStep) -> PerSample:
        """On the ranks of the last pipeline stage; empty on others."""
        found: PerSample = {}

        def take(packed: Packed, values_N: torch.Tensor) -> torch.Tensor:
            if packed.loss_tokens:
                found.update(split(values_N.cpu().numpy(), packed))
            return values_N

        for update in range(self._minibatches):  # every epoch has the same microbatches
            self._run(step, update, take, score_only=True)
        return found

    def _accumulate(self, step: LoadedStep, update: int, returns: Sequence[NDArray[np.float32]], tally: Tally) -> None:
        self._run(step, update, partial(self._loss, step, step.weights(update), returns, tally), score_only=False)

    def _run(self, step: LoadedStep, update: int, take: Any, *, score_only: bool) -> None:
        indices = step.plan.updates[update].ranks[self._data_rank]
        microbatches = in_rounds([pack(step.batch.samples, i, self._layout, self._device) for i in indices], self._layout, self._device)
        if microbatches:
            schedule(self._chunks, microbatches, forward_values, take, score_only=score_only, around=None)


def _with_head(family: Family) -> Family:
    """The family's table for a model with one number in place of a vocabulary. A language model's output layer is left out of its files."""
    rows = (*(row for row in family.rows if row.megatron != OUTPUT.megatron), _HEAD)
    return replace(family, rows=rows, ignored=lambda config: (*family.ignored(config), *OUTPUT.hf))
