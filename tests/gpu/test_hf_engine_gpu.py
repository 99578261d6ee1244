"""The `hf` engine on a GPU: against transformers, against itself for bits, and its weight updates against the CPU's hashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from tests.contracts.engine_cases import (
    ask,
    hf_engine,
    load,
    opening,
    paused,
    perturbed,
    prompt,
    reference_logprobs,
    same,
)
from verst.rollout.hf import HFEngine
from verst.rollout.hf.graphs import ForwardGraphs
from verst.types import Generation
from verst.weights.files import FileUpdate, publish

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # of drivers and the compiler
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Both round differently in bfloat16: the engine attends by another kernel, and keeps its logits in float32.
LIMITS = {"float32": 1e-4, "bfloat16": 0.3}

Opened = Callable[..., Awaitable[HFEngine]]


@pytest.fixture
async def opened(models: Callable[[str], Path]) -> AsyncIterator[Opened]:
    async with opening(partial(hf_engine, device="cuda", max_running=16, threads=None), models) as start:
        yield start


def reference(path: Path, dtype: str = "float32") -> torch.nn.Module:
    return load(path, DTYPES[dtype], attn_implementation="eager").to("cuda")


async def crowd(engine: HFEngine) -> list[Generation]:
    """Twenty requests of many lengths, more than run at once; the first four share a prompt."""
    requests = [ask(f"r{n}", prompt(0 if n < 4 else n, length=9 + 3 * max(n - 3, 0)), seed=n, max_new_tokens=70 - n) for n in range(20)]
    return await asyncio.gather(*(engine.generate(request) for request in requests))


def whole(generation: Generation) -> tuple[NDArray[np.int32], int]:
    """Prompt and generated tokens of a member of the crowd, and the prompt's length."""
    n = int(generation.id[1:])
    opening = prompt(0 if n < 4 else n, length=9 + 3 * max(n - 3, 0))
    return np.concatenate((opening, generation.tokens_T)), len(opening)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "free"])
@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float32"), ("qwen3_sliding", "float32"), ("qwen3_moe", "float32"), ("llama", "bfloat16")]
)
async def test_logprobs_are_those_of_transformers(
    opened: Opened, models: Callable[[str], Path], model: str, dtype: str, deterministic: bool
) -> None:
    engine = await opened(model, dtype=dtype, deterministic=deterministic)
    plain = reference(models(model), dtype)
    for generation in await crowd(engine):
        tokens, given = whole(generation)
        expected = reference_logprobs(plain, tokens)
        np.testing.assert_allclose(generation.logprobs_T, expected[given - 1 :], rtol=0, atol=LIMITS[dtype])
        np.testing.assert_allclose((await engine.logprobs(tokens))[1:], expected, rtol=0, atol=LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(DTYPES))
async def test_a_sequence_has_the_same_bits_in_company(opened: Opened, dtype: str) -> None:
    engine = await opened(dtype=dtype)
    together = await crowd(engine)
    for generation in (together[0], together[7], together[19]):
        _, given = whole(generation)
        n = int(generation.id[1:])
        alone = await engine.generate(ask(f"alone{n}", whole(generation)[0][:given], seed=n, max_new_tokens=70 - n))
        assert same(alone, generation)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "free"])
async def test_recorded_passes_compute_what_the_others_do(opened: Opened, monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    recorded = await opened(deterministic=deterministic)
    answers = await crowd(recorded)
    assert recorded.stats()["recordings"] > 0
    monkeypatch.setattr(ForwardGraphs, "_record", refuse)
    plain = await opened(deterministic=deterministic)
    for one, other in zip(answers, await crowd(plain), strict=True):
        np.testing.assert_array_equal(one.tokens_T, other.tokens_T)
        np.testing.assert_allclose(one.logprobs_T, other.logprobs_T, rtol=0, atol=1e-4)
    assert plain.stats()["recordings"] == 0


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "free"])
async def test_routes_are_those_of_transformers(opened: Opened, models: Callable[[str], Path], deterministic: bool) -> None:
    engine = await opened("qwen3_moe", deterministic=deterministic, record_routes=True)
    kind = engine.routed_experts
    assert kind is not None
    requests = [replace(ask(str(n), prompt(n // 2, length=9 + n), seed=n, max_new_tokens=20 + n), routes_from=0) for n in range(8)]
    answers = await asyncio.gather(*(engine.generate(request) for request in requests))
    without = await opened("qwen3_moe", deterministic=deterministic)
    others = await asyncio.gather(*(without.generate(replace(request, routes_from=None)) for request in requests))
    assert [one.tokens_T.tolist() for one in answers] == [other.tokens_T.tolist() for other in others]
    assert engine.stats()["recordings"] == without.stats()["recordings"]  # so its passes can be recorded just as well
    plain: Any = reference(models("qwen3_moe"), "float32")
    differing = total = 0
    for request, answer in zip(requests, answers, strict=True):
        tokens = torch.from_numpy(np.concatenate((request.tokens_T, answer.tokens_T))[None, :-1].astype(np.int64)).to(plain.device)
        with torch.no_grad():
            scores = plain.model(input_ids=tokens, output_router_logits=True).router_logits
        expected = torch.stack([layer.topk(kind.chosen).indices for layer in scores], 1).sort(-1).values.cpu().numpy()
        assert answer.experts_RLK is not None
        assert answer.experts_RLK.shape == expected.shape
        different = np.sort(answer.experts_RLK, -1) != expected
        differing, total = differing + int(different.any(-1).sum()), total + different[..., 0].size
    assert differing <= 0.002 * total  # scores that lie as close together as the noise of two attention kernels


def refuse(*_: object) -> None:
    raise RuntimeError("this pass cannot be recorded")


async def test_an_update_is_verified_and_takes_effect_in_recorded_passes(
    opened: Opened, models: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = await opened()
    before = await crowd(engine)
    state = perturbed(models("llama"))
    manifest = publish(1, iter(state.items()), tmp_path)  # hashed on the CPU
    async with paused(engine):
        checksums = await engine.update_weights(FileUpdate(manifest))
    assert checksums == {entry.name: entry.checksum for entry in manifest.entries}
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    model.load_state_dict(state, strict=False)
    model.save_pretrained(tmp_path / "updated")
    after = await crowd(engine)
    assert not any(same(one, other) for one, other in zip(before, after, strict=True))
    tokens, given = whole(after[0])
    expected = reference_logprobs(reference(tmp_path / "updated"), tokens)[given - 1 :]
    np.testing.assert_allclose(after[0].logprobs_T, expected, rtol=0, atol=1e-4)
