"""Models, requests and references for the engine suites: add an engine to `ENGINES` and all of them cover it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from verst.protocols import Engine
from verst.rollout.hf import HFEngine
from verst.types import GenerateRequest, Generation, Manifest, Sampling, TensorEntry
from verst.weights.checksum import tensor_checksum

VOCAB = 64
EOS = 63
MAX_TOKENS = 160
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.3,  # far from uniform, so that a wrong mask or position shows
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
ROUTED = Qwen3MoeConfig(**{**TINY, "num_hidden_layers": 3, "eos_token_id": None}, **EXPERTS)  # every generation goes on to its limit
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16, tie_word_embeddings=True),
    "qwen3_sliding": Qwen3Config(**TINY, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3_moe": Qwen3MoeConfig(**TINY, **EXPERTS),
    "olmoe": OlmoeConfig(**TINY, num_experts=6, num_experts_per_tok=2),
}
SAVED = CONFIGS | {"routed": ROUTED}


def hf_engine(path: str | Path, **options: Any) -> HFEngine:
    settings = {"dtype": "float32", "device": "cpu", "max_running": 6, "max_model_tokens": MAX_TOKENS, "deterministic": True, "threads": 1}
    return HFEngine(str(path), **(settings | options))


DENSE = "qwen3"
"""The dense model that tests share an SGLang server of."""
ENGINES: dict[str, Callable[..., Engine]] = {"hf": partial(hf_engine, version=3)}


def save_model(path: Path, config: PreTrainedConfig) -> Path:
    """A random model, without a tokenizer."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def words(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose token n reads "wn"."""
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


E = TypeVar("E", bound=Engine)
Opened = Callable[..., Awaitable[Engine]]


@asynccontextmanager
async def opening(make: Callable[..., E], models: Callable[[str], Path]) -> AsyncIterator[Callable[..., Awaitable[E]]]:
    """A function that starts an engine on a model; all of them are closed at the end."""
    engines: list[E] = []

    async def start(model: str = "llama", **options: Any) -> E:
        engine = make(models(model), **options)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()


SGLANG = "sglang" if find_spec("sglang") is not None else None  # not part of the default install; `make stack` installs it
SERVED = [*ENGINES, *([pytest.param(SGLANG, marks=pytest.mark.slow)] if SGLANG else [])]
"""For what is promised without seeds and step counters. The others need an engine that has them (on a CPU SGLang has no seeds)."""


def prompt(*seed: int, length: int = 9) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, EOS, length, dtype=np.int32)


def ask(id: str, tokens: NDArray[np.int32], seed: int = 0, **sampling: object) -> GenerateRequest:
    settings = {"max_new_tokens": 12, **sampling}
    return GenerateRequest(id, tokens, Sampling(**settings), seed)  # type: ignore[arg-type]


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager", **options).eval()


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, tokens: NDArray[np.int32], temperature: float = 1.0) -> NDArray[np.float32]:
    """By transformers' own full forward pass: log-probability of tokens 1, 2, …

    A float32 model is computed in float64: the largest of a thousand roundings of two sides in float32 is now and then above 1e-5.
    """
    if next(model.parameters()).dtype is torch.float32:
        model = copy.deepcopy(model).double()
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].float().cpu().numpy()


def same(one: Generation, other: Generation) -> bool:
    """Equal to the bit."""
    return (
        one.tokens_T.tobytes() == other.tokens_T.tobytes()
        and one.logprobs_T.tobytes() == other.logprobs_T.tobytes()
        and one.finish == other.finish
    )


class Update:
    """A `WeightUpdate` made from a state dict; `corrupt` names a tensor that changes on its way."""

    def __init__(self, state: dict[str, torch.Tensor], version: int, corrupt: str | None = None) -> None:
        entries = tuple(
            TensorEntry(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), self.checksum(t), t.nbytes) for name, t in state.items()
        )
        self.manifest = Manifest(version, "nowhere", entries, "")
        self._state, self._corrupt = state, corrupt

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state.items():
            yield name, tensor + 1 if name == self._corrupt else tensor

    def checksum(self, tensor: torch.Tensor) -> str:
        return tensor_checksum(tensor)


def perturbed(path: Path, by: float = 0.5) -> dict[str, torch.Tensor]:
    """Other weights for the same model."""
    generator = torch.Generator().manual_seed(1)
    parameters = {name: parameter.detach() for name, parameter in load(path).named_parameters()}
    return {name: p + by * p.std() * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


@asynccontextmanager
async def paused(engine: Engine) -> AsyncIterator[None]:
    await engine.pause()
    yield
    await engine.resume()


async def reached(engine: Engine, counter: str, value: float) -> None:
    """Waits until one of the engine's counters is at least this."""
    async with asyncio.timeout(60):
        while engine.stats()[counter] < value:  # noqa: ASYNC110 - an engine has counters, no events
            await asyncio.sleep(0.001)
