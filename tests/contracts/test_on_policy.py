"""Trainer minus behaviour log-probability is 0, to the bit, for every token that the embedded pair samples and trains at one version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3Config

from tests.contracts.engine_cases import CONFIGS, TINY, Update, ask, hf_engine, paused, prompt, reached
from tests.contracts.on_policy_cases import as_sample, first_differences, requests, sampled, save_with_tokenizer, trained
from verst.rollout.hf import HFEngine
from verst.types import FinishReason, Sample

# Inner sizes above 576, where MKL needs 16 rows, widths that end within a vector, and heads of 128.
WIDE: dict[str, Any] = {
    **TINY,
    "vocab_size": 1001,
    "hidden_size": 640,
    "intermediate_size": 1000,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
LATENT: dict[str, Any] = {
    **{**TINY, "num_key_value_heads": 4, "initializer_range": 0.1},
    **{"kv_lora_rank": 64, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1},
}
MODELS: dict[str, PreTrainedConfig] = {
    **CONFIGS,
    "llama_tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "wide": LlamaConfig(**{**WIDE, "initializer_range": 0.1}, attention_bias=True),
    "latent": DeepseekV3Config(**LATENT),
    "shared_expert": Qwen2MoeConfig(
        **TINY, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "heads_of_128": Qwen3Config(**{**TINY, "hidden_size": 96, "initializer_range": 0.1}, head_dim=128),
}

Opened = Callable[..., Awaitable[HFEngine]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_with_tokenizer(tmp_path_factory.mktemp(name), MODELS[name])
        return made[name]

    return make


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    engines: list[HFEngine] = []

    async def start(path: Path, **options: Any) -> HFEngine:
        engine = hf_engine(path, record_routes=True, **options)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()


def require_zero(path: Path, samples: list[Sample], temperature: float, **train: Any) -> None:
    _, report = trained(path, samples, temperature, **train)
    longest = max(samples, key=lambda sample: len(sample.tokens_T))
    assert report["mismatch/abs_max"] == 0.0, first_differences(path, longest.tokens_T)
    assert report["mismatch/k3"] == 0.0


@pytest.mark.parametrize("name", list(MODELS))
async def test_every_sampled_token_has_the_trainers_log_probability(models: Callable[[str], Path], opened: Opened, name: str) -> None:
    """Prompts and answers of many lengths, groups that share a prompt, more requests than slots."""
    path = models(name)
    samples = await sampled(await opened(path), requests(1.0))
    assert len({len(sample.tokens_T) for sample in samples}) > 12
    require_zero(path, samples, 1.0)


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.7])
async def test_temperatures_are_rounded_alike(models: Callable[[str], Path], opened: Opened, temperature: float) -> None:
    path = models("qwen3")
    require_zero(path, await sampled(await opened(path), requests(temperature)), temperature)


@pytest.mark.parametrize(
    "train",
    [{"gradient_checkpointing": True}, {"microbatch_tokens": 150}, {"microbatch_tokens": 4096}, {"minibatches": 3, "groups_per_step": 6}],
    ids=["checkpointing", "single", "whole", "minibatches"],
)
async def test_however_the_trainer_divides_its_work(models: Callable[[str], Path], opened: Opened, train: dict[str, Any]) -> None:
    path = models("qwen3_moe")
    require_zero(path, await sampled(await opened(path), requests(0.8, groups=6)), 0.8, **train)


async def test_a_microbatch_of_few_tokens(models: Callable[[str], Path], opened: Opened) -> None:
    """Unless it is filled up, products of so few rows have other bits: 1.6e-5 here, for the sample of 11 tokens."""
    path = models("wide")
    sizes = [(1, 1), (1, 2), (2, 3), (3, 8), (5, 1)]
    asked = [ask(f"{n}/0", prompt(n, length=length), seed=n, max_new_tokens=new, temperature=0.7) for n, (length, new) in enumerate(sizes)]
    for sample in await sampled(await opened(path), asked):
        require_zero(path, [sample], 0.7)


async def test_later_turns_and_continuations_of_what_was_aborted(models: Callable[[str], Path], opened: Opened) -> None:
    """Their prefill covers tokens that the engine decoded before: the same keys and values come out."""
    path = models("qwen3_sliding")
    engine = await opened(path)
    samples = []
    for number, first in enumerate(await sampled(engine, requests(0.8, groups=4, stop_token_ids=(7, 11)))):
        reply = np.concatenate((first.tokens_T, prompt(99, length=number % 5)))
        request = ask(first.id, reply, seed=100 + number, max_new_tokens=20, temperature=0.8)
        samples.append(as_sample(request, await engine.generate(request), behind=first))
    require_zero(path, samples, 0.8)


async def test_sequences_that_were_computed_anew_after_their_memory_was_given_up(models: Callable[[str], Path], opened: Opened) -> None:
    path = models("qwen3")
    engine = await opened(path)
    asked = [replace(request, sampling=replace(request.sampling, max_new_tokens=70)) for request in requests(0.8, groups=2)]
    running = [asyncio.ensure_future(engine.generate(request)) for request in asked]
    await reached(engine, "decode_steps", 20)
    async with paused(engine):
        assert engine.stats()["running"] > 0
        await engine.release_memory(weights=False)
        await engine.resume_memory()
    generations = await asyncio.gather(*running)
    assert {generation.finish for generation in generations} <= {FinishReason.STOP, FinishReason.LENGTH}
    require_zero(path, [as_sample(request, generation) for request, generation in zip(asked, generations, strict=True)], 0.8)


async def test_after_an_update_too_and_the_probe_agrees(models: Callable[[str], Path], opened: Opened) -> None:
    path = models("llama")
    engine = await opened(path)
    samples = await sampled(engine, requests(0.8, groups=3))
    backend, _ = trained(path, samples, 0.8)
    tokens = prompt(5, length=41)
    before = await engine.logprobs(tokens)
    np.testing.assert_array_equal(before, backend.logprobs(tokens))
    backend.optimizer_step(0)
    async with paused(engine):
        await engine.update_weights(Update({name: tensor.clone() for name, tensor in backend.weights()}, 1))
    after = await engine.logprobs(tokens)
    np.testing.assert_array_equal(after, backend.logprobs(tokens))
    assert np.abs(after - before).max() > 1e-3


async def test_two_threads(models: Callable[[str], Path], opened: Opened) -> None:
    path = models("qwen3")
    samples = await sampled(await opened(path, threads=2), requests(0.8))
    torch.set_num_threads(2)
    require_zero(path, samples, 0.8, threads=2)


async def test_a_difference_would_be_found_and_named(
    models: Callable[[str], Path], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer with PyTorch's own attention instead: the tests above would see it, and say where it begins."""
    path = models("qwen3")
    samples = await sampled(await opened(path), requests(1.0))
    monkeypatch.setattr("verst.training.model.use_exact_attention", lambda model: None)
    _, report = trained(path, samples, 1.0)
    assert 0.0 < report["mismatch/abs_max"] < 1e-4
    assert "layers.0.self_attn.o_proj differs" in first_differences(path, samples[2].tokens_T)
