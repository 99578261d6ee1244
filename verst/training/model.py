"""A transformers model as a policy: loading it whole or not at all, and log-probabilities of chosen tokens from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verst.config.plan import UNFIT, loading
from verst.errors import ModelError
from verst.exact.attention import use_exact_attention
from verst.exact.experts import use_exact_experts
from verst.exact.layers import use_exact_layers
from verst.exact.rows import row_multiple
from verst.model_spec import key_mapping
from verst.training.logprobs import token_logprobs

DYNAMIC = True
"""Sizes stay symbols in compiled layers, from the first call on: else the first batch and the next ones would each make graphs."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_PROBE_LOGIT = 20.0  # spread of the head check's logits: wide enough that a softcap (30 to 50 in the wild) bends them visibly


@dataclass(frozen=True, slots=True)
class Head:
    """How hidden states become logits: softcap · tanh(scale · (h Wᵀ + b) / softcap), or without a cap scale · (h Wᵀ + b)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, projected: torch.Tensor) -> torch.Tensor:
        scaled = projected * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def load_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a Hugging Face directory, on the CPU, in evaluation mode: the policy that samples has no dropout either.

    Raises `ModelError` if the directory, its config, weights or tokenizer are missing, and if any parameter has no (or an
    unfitting) tensor in the files: transformers would draw it at random and train on.
    """
    directory = Path(path).expanduser()
    require_files(directory)
    with loading(f"model.path {path}: transformers cannot load it as a causal language model", UNFIT):
        config = AutoConfig.from_pretrained(directory)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            key_mapping=key_mapping(config),
        )
    model, report = loaded
    lost = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lost:
        raise ModelError(
            f"model.path {path}: the weight files have no fitting tensor for {named(lost)}; "
            "give the files that belong to this config.json, or the config.json that belongs to these files"
        )
    return model.eval()


def require_files(path: Path) -> None:
    """Raises `ModelError` unless the directory has a config, weights and a tokenizer."""
    if not path.is_dir():
        raise ModelError(f"model.path {path}: no such directory; give a Hugging Face model directory on this machine")
    if not (path / "config.json").is_file():
        raise ModelError(f"model.path {path}: no config.json; give a whole Hugging Face model directory")
    if not any(found for pattern in _WEIGHTS for found in path.glob(pattern)):
        raise ModelError(f"model.path {path}: no weights (*.safetensors); save them there with save_pretrained, or give another directory")
    if not any((path / name).is_file() for name in _TOKENIZER):
        raise ModelError(f"model.path {path}: no tokenizer (tokenizer.json); save the model's tokenizer there with save_pretrained")


def named(names: Sequence[str], shown: int = 4) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def compiled(forward: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """A layer's forward, compiled for any number of sequences and tokens: rollouts seldom have the same lengths twice."""
    return torch.compile(forward, dynamic=DYNAMIC, backend=backend)


class Layered(nn.Module):
    """A decoder and the linear head behind it, which run apart from the transformers model that they are parts of.

    `model` keeps that model whole, so parameters keep their Hugging Face names; those outside of the two parts are frozen. `where` begins
    the message of the `ModelError` for a model that cannot be followed.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module, head: Any, where: str) -> None:
        super().__init__()
        self.model = model
        self._family = type(model).__name__
        self._where = where
        if decoder is model or not isinstance(head, nn.Linear):
            raise ModelError(f"{where}: {self._family} is no decoder followed by one linear head; use another model")
        # Not registered a second time: they are submodules of `model` already.
        self._parts: tuple[nn.Module, nn.Linear] = (decoder, head)
        model.requires_grad_(False)
        decoder.requires_grad_(True)
        head.requires_grad_(True)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, in order: the units of sharding, recomputation and compilation."""
        for child in self._parts[0].children():
            if isinstance(child, nn.ModuleList):
                return list(child)
        raise ModelError(f"{self._where}: {self._family} keeps its layers in no list; use another model")

    def prepare_layers(self, *, recompute: bool, compile_each: bool) -> None:
        """Gradient checkpointing and `torch.compile` of each layer. They go inside the hooks that sharding adds to a layer's call."""
        for layer in self.layers:
            forward: Any = layer.forward
            if compile_each:
                forward = compiled(forward)
            if recompute:
                # Not transformers' own switch: that one needs training mode, and training mode means dropout.
                forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            layer.forward = forward


class Policy(Layered):
    """Log-probabilities of chosen tokens. Only their hidden states meet the vocabulary matrix.

    Parameters that take no part in predicting text (the vision tower of a multimodal model) are frozen. Raises `ModelError` for a model
    whose layers or head it cannot follow.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        super().__init__(model, model.get_decoder(), model.get_output_embeddings(), f"model.path {path}")
        projection = self._parts[1]
        self.vocabulary = projection.out_features
        self.multiple = 1
        """Of which the number of tokens in a forward pass has to be a multiple."""
        self._exact = False
        self.head = _head_of(model.config.get_text_config())
        self._check_head()

    def make_exact(self, device: torch.device) -> None:
        """From now on, on such a device, a token has the bits of the `hf` engine in deterministic mode, whatever its neighbours."""
        use_exact_attention(self.model)
        self._exact = True
        if device.type == "cuda":
            use_exact_layers(self.model, self._parts[1])
            return
        use_exact_experts(self.model)
        self.multiple = row_multiple(self.model.config.get_text_config())

    def forward(
        self, tokens_BT: torch.Tensor, positions_N: torch.Tensor, targets_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [N] of each target and entropy [N] (no gradient) of its distribution, float32.

        `positions_N` indexes the flattened `tokens_BT` at the token before each target. Rows are padded on the right and need no
        mask: attention is causal, so no token sees what comes after it.
        """
        decoder, projection = self._parts
        hidden_BTH = decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, positions_N)
        return token_logprobs(
            hidden_NH,
            projection.weight,
            targets_N,
            bias=projection.bias,
            temperature=temperature,
            softcap=self.head.softcap,
            scale=self.head.scale,
            exact=self._exact,
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Feeds random hidden states through the model's own head and through `Head`: families differ in more than attributes tell."""
        decoder, projection = self._parts
        noise_H = torch.randn(1, 2, projection.in_features, generator=torch.Generator().manual_seed(0)).to(projection.weight)
        projected = projection(noise_H).float()
        stretch = _PROBE_LOGIT / projected.std().clamp(min=1e-6)
        noise_H = noise_H * stretch.to(noise_H)

        def replace(module: nn.Module, args: object, output: Any) -> Any:
            output.last_hidden_state = noise_H
            return output

        hook = decoder.register_forward_hook(replace)
        try:
            theirs = self.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits.float()
        finally:
            hook.remove()
        ours = self.head.logits(projection(noise_H).float())
        if not torch.allclose(theirs, ours, rtol=0.02, atol=0.02 * float(ours.abs().max())):
            raise ModelError(
                f"{self._where}: the head of {self._family} does more than a linear layer, a scale and a softcap; "
                "its log-probabilities would be wrong, so it cannot be trained by this backend"
            )


def _head_of(text_config: Any) -> Head:
    """Where families keep the head's constants: Cohere multiplies, Granite divides, Gemma caps."""
    scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(getattr(text_config, "logits_scaling", None) or 1.0)
    return Head(scale, getattr(text_config, "final_logit_softcapping", None))
