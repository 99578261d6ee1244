"""The critic of a rank of the `fsdp` backend: a second model beside the policy, whose head gives one number, and its optimizer.

It works through the policy's microbatches, is sharded like the policy, and is neither published nor exported. The value of a loss token is
that of the state before it: read where the policy predicts that token.
"""

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

from verst.algorithms.critic import value_loss
from verst.config.algorithms import PpoConfig
from verst.config.plan import UNFIT, loading
from verst.config.schema import Config
from verst.errors import ModelError
from verst.observe.metrics import Tally
from verst.training.distributed import place, release
from verst.training.microbatch import Microbatch, flat, split
from verst.training.model import Layered, named
from verst.training.optimizer import MasterAdamW
from verst.training.step import LoadedStep, PerSample

_HEAD = "score.weight"
"""What transformers calls the head of its sequence classification models."""


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

    A head of zeros draws nothing: the first values are 0 on every rank. `where` names the option that has the path. Raises `ModelError`
    if the directory has no fitting tensor for a parameter of the decoder, or a head that gives more than one number.
    """
    with loading(f"{where} {path}: transformers cannot load it as a sequence classification model", UNFIT), _unreported():
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
    lost = sorted(missing - {_HEAD}) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{where} {path}: the weight files have no fitting tensor for {named(lost)}; "
            "give a causal language model, or a reward model whose head gives one number"
        )
    if _HEAD in missing:
        nn.init.zeros_(model.score.weight)
    return model.eval()


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Keeps transformers from telling that a head was drawn at random, and the language model's left out: what matters is checked."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Critic:
    """One rank's. From two ranks on, the constructor and all methods that compute are collectives."""

    def __init__(self, config: Config, options: PpoConfig, *, world: int, device: torch.device, num_updates: int) -> None:
        train, dtype = config.train, getattr(torch, config.model.dtype)
        path = options.critic_path or config.model.path
        where = "model.path" if options.critic_path is None else "algorithm.critic_path"
        self._options = options
        self._model = ValueModel(load_value_model(path, dtype, where), f"{where} {path}")
        self._model.prepare_layers(recompute=train.gradient_checkpointing, compile_each=train.compile)
        place(self._model, device, world, kept_dtype=torch.float32)
        self.parameters = dict(self._model.model.named_parameters())
        """By Hugging Face name, as they are between two passes."""
        trainable = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        own = train.model_copy(update={"lr": options.critic_lr or train.lr})
        names = {"metrics": "critic", "rate": "train.lr" if options.critic_lr is None else "algorithm.critic_lr"}
        self.optimizer = MasterAdamW(trainable, own, num_updates, config.run.steps, **names)
        self._loss_is_finite = True
        self._broken: list[str] = []

    @property
    def warmup_steps(self) -> int:
        """First steps of a run, which leave the policy as it is."""
        return self._options.critic_warmup_steps

    @property
    def modules(self) -> list[nn.Module]:
        return [self._model]

    @torch.no_grad()
    def score(self, step: LoadedStep, minibatches: int) -> PerSample:
        """The value before each loss token of this rank's samples."""
        found: PerSample = {}
        for update in range(minibatches):  # every epoch has the same microbatches
            for microbatch in step.microbatches(update):
                values_N = self._forward(microbatch)
                release(self._model)
                if microbatch.loss_tokens:
                    found |= split(values_N.cpu().numpy(), microbatch)
        return found

    def accumulate(self, step: LoadedStep, update: int, returns: Sequence[NDArray[np.float32]]) -> Tally:
        """Forward and backward of one update's microbatches. `returns` [N] of each sample of the whole batch."""
        self.optimizer.zero_grad()
        self._loss_is_finite, self._broken = True, []
        weights, tally = step.weights(update), Tally()
        for microbatch in step.microbatches(update):
            values_N = self._forward(microbatch)
            if microbatch.loss_tokens:
                self._backward(step, microbatch, values_N, weights, returns, tally)
            else:
                (values_N.sum() * 0.0).backward()
        return tally

    def optimizer_step(self, name: str) -> Tally:
        """Clips and steps, or skips; see `ScheduledOptimizer.step`."""
        return self.optimizer.step(f"{name}, of the critic,", loss_is_finite=self._loss_is_finite, broken=self._broken)

    def _forward(self, microbatch: Microbatch) -> torch.Tensor:
        return self._model(microbatch.tokens_BT, microbatch.positions_N)

    def _backward(
        self,
        step: LoadedStep,
        microbatch: Microbatch,
        values_N: torch.Tensor,
        weights: PerSample,
        returns: Sequence[NDArray[np.float32]],
        tally: Tally,
    ) -> None:
        def tensor(of_sample: PerSample) -> torch.Tensor:
            return torch.from_numpy(flat(of_sample, microbatch)).to(values_N.device)

        returns_N, weights_N = tensor({i: returns[i] for i in microbatch.indices}), tensor(weights)
        per_token_N, metrics = value_loss(values_N, tensor(step.values), returns_N, self._options.value_clip)
        loss = (weights_N * per_token_N).sum()
        total, share, *sums = torch.stack([loss.detach(), weights_N.sum(), *(m.sum() for m in metrics.values())]).double().tolist()
        tally.mean("critic/loss", total, share)
        for name, value in zip(metrics, sums, strict=True):
            tally.mean(f"critic/{name}", value, microbatch.loss_tokens)
        loss.backward()
        if not np.isfinite(total):
            self._loss_is_finite = False
            finite_N = torch.isfinite(per_token_N.detach()).cpu().numpy()
            broken = dict.fromkeys(microbatch.sample_of_token()[~finite_N].tolist())
            self._broken += [f"sample {step.batch.samples[i].id}: its value or its return is not finite" for i in broken]
