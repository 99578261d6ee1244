"""The fakes keep the protocols they stand for, and the tiny model is a real one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from verst.errors import EngineFailure, InvariantViolation
from verst.testing import FakeEngine, tiny_model, tiny_tokenizer
from verst.types import FinishReason, GenerateRequest, Manifest, Sampling


def request(name: str, max_new_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(name, np.array([1, 2], np.int32), Sampling(max_new_tokens), seed=0)


class Update:
    manifest = Manifest(2, "", (), "")

    def tensors(self):
        yield "w", torch.ones(2)

    def checksum(self, tensor):
        return f"sum {tensor.sum():g}"


async def test_completions_in_order_with_their_log_probabilities():
    engine = FakeEngine([[7, 8], [9]])
    first, second, third = [await engine.generate(request(name, limit)) for name, limit in (("a", 8), ("b", 8), ("c", 8))]
    assert [g.tokens_T.tolist() for g in (first, second, third)] == [[7, 8], [9], [9]]
    assert first.logprobs_T.tolist() == [-1 / 8, -2 / 8]  # 7 % 7 + 1 and 8 % 7 + 1 eighths
    assert (await engine.logprobs(np.array([7, 7, 8], np.int32))).tolist() == [0.0, -1 / 8, -2 / 8]
    cut = await FakeEngine([[7, 8]]).generate(request("a", 1))
    assert (cut.tokens_T.tolist(), cut.finish) == ([7], FinishReason.LENGTH)
    assert engine.events == [(kind, name) for name in "abc" for kind in ("generate", "finish")]


async def test_a_paused_engine_generates_nothing_and_takes_weights():
    engine = FakeEngine(lambda _: [1] * 6, tick_s=0.001)
    with pytest.raises(InvariantViolation, match="version 2 of an engine that is not paused"):
        await engine.update_weights(Update())
    running = asyncio.create_task(engine.generate(request("a")))
    await engine.generated(2)
    await engine.pause()
    before = engine.stats()["generated_tokens"]
    await asyncio.sleep(0.02)
    assert engine.stats()["generated_tokens"] == before
    assert await engine.update_weights(Update()) == {"w": "sum 2"}
    await engine.resume()
    generation = await running
    assert (generation.versions_T[0], generation.versions_T[-1], engine.version) == (0, 2, 2)
    assert [kind for kind, _ in engine.events] == ["generate", "pause", "update", "resume", "finish"]


async def test_an_abort_ends_stalled_and_paused_requests():
    engine = FakeEngine([[1, 2]], stall_at=0)
    stalled, paused = (asyncio.create_task(engine.generate(request(name))) for name in ("a", "b"))
    await engine.pause()
    await asyncio.sleep(0.01)
    await engine.abort(["a"])
    assert (await stalled).finish is FinishReason.ABORT
    assert not paused.done()
    await engine.abort()
    assert (await paused).finish is FinishReason.ABORT


async def test_failures_come_when_told():
    engine = FakeEngine([[1, 2]], fail_at=1)
    await engine.generate(request("a"))
    with pytest.raises(EngineFailure, match=r"told to fail at request 1 \(b\)"):
        await engine.generate(request("b"))
    assert engine.stats()["running"] == 0


def test_tiny_model_depends_on_its_seed_only(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    paths = [tiny_model(tmp_path / name, seed=seed, num_hidden_layers=1) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.rand(1) == expected  # global random numbers are untouched
    bits = [(path / "model.safetensors").read_bytes() for path in paths]
    assert bits[0] == bits[1] != bits[2]
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (1, len(tiny_tokenizer()))
    assert model.generation_config.eos_token_id == tiny_tokenizer().eos_token_id
