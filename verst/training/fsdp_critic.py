"""The critic of the `fsdp` backend: a transformers model, plain on one rank, sharded by FSDP2 from two on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from verst.config.algorithms import PpoConfig
from verst.config.plan import UNFIT, loading
from verst.config.schema import Config
from verst.errors import ModelError
from verst.observe.metrics import Tally
from verst.training.critic import CRITIC, HEAD, Critic
from verst.training.distributed import place, release
from verst.training.microbatch import Microbatch, split
from verst.training.model import Layered, named
from verst.training.optimizer import MasterAdamW
from verst.training.rest import unique
from verst.training.step import LoadedStep, PerSample


class ValueModel(Layered):
    """One value for each of the chosen places. Raises `ModelError` for a model whose layers or head it cannot follow."""

    def __init__(self, model: PreTrainedModel, where: str) -> None:
        super().__init__(model, getattr(model, model.base_model_prefix), getattr(model, "score", None), where)

    def forward(self, tokens_BT: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """[N] float32, at places of the flattened `tokens_BT`; see `Policy.forward`."""
        decoder, head = self._parts
        hidden_BTH = decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, positions_N)
        return nn.functional.linear(hidden_NH.float(), head.weight.float())[:, 0]


def load_value_model(path: str, dtype: torch.dtype, where: str) -> PreTrainedModel:
    """A causal language model's decoder with a head of zeros, or a reward model with its own, on the CPU, in evaluation mode.

    A head of zeros draws nothing: the first values are 0 on every rank. `where` begins messages. Raises `ModelError`
    if the directory has no fitting tensor for a parameter of the decoder, or a head that gives more than one number.
    """
    with loading(f"{where}: transformers cannot load it as a sequence classification model", UNFIT), _unreported():
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            Path(path).expanduser(),
            num_labels=1,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    missing = set(report["missing_keys"])
    lost = sorted(missing - {HEAD}) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{where}: the weight files have no fitting tensor for {named(lost)}; "
            "give a causal language model, or a reward model whose head gives one number"
        )
    if HEAD in missing:
        nn.init.zeros_(model.score.weight)
    return model.eval()


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Keeps transformers from telling that a head was drawn at random, and the language model's left out: what matters is checked."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class FsdpCritic(Critic[MasterAdamW]):
    """See `Critic`. Raises `ModelError` if the model cannot be loaded or followed."""

    def __init__(self, config: Config, options: PpoConfig, *, world: int, device: torch.device, num_updates: int) -> None:
        super().__init__(config, options)
        train, dtype = config.train, getattr(torch, config.model.dtype)
        self._model = ValueModel(load_value_model(self._path, dtype, self._where), self._where)
        self._model.prepare_layers(recompute=train.gradient_checkpointing, compile_each=train.compile)
        place(self._model, device, world, kept_dtype=torch.float32)
        self.parameters = dict(self._model.model.named_parameters())
        """By Hugging Face name, as they are between two passes."""
        trainable = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.optimizer = MasterAdamW(trainable, self._train, num_updates, config.run.steps, **self._names)

    @property
    def modules(self) -> list[nn.Module]:
        return [self._model]

    @property
    def layers(self) -> list[nn.Module]:
        return self._model.layers

    def held(self) -> dict[str, torch.Tensor]:
        weights = {f"weights/{name}": tensor for name, tensor in self.parameters.items()}
        return {f"{CRITIC}{name}": tensor for name, tensor in unique(weights, self.optimizer.tensors()).items()}

    @torch.no_grad()
    def score(self, step: LoadedStep) -> PerSample:
        found: PerSample = {}
        for update in range(self._minibatches):  # every epoch has the same microbatches
            for microbatch in step.microbatches(update):
                values_N = self._forward(microbatch)
                release(self._model)
                if microbatch.loss_tokens:
                    found |= split(values_N.cpu().numpy(), microbatch)
        return found

    def _accumulate(self, step: LoadedStep, update: int, returns: Sequence[NDArray[np.float32]], tally: Tally) -> None:
        weights = step.weights(update)
        for microbatch in step.microbatches(update):
            self._loss(step, weights, returns, tally, microbatch, self._forward(microbatch)).backward()

    def _forward(self, microbatch: Microbatch) -> torch.Tensor:
        return self._model(microbatch.tokens_BT, microbatch.positions_N)
