"""What is particular to the `hf` engine: failures, refused models, gaps, held prompts and attended lengths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MambaConfig, PreTrainedConfig

from tests.contracts.engine_cases import TINY, ask, hf_engine, opening, prompt, save_model
from verst.errors import EngineFailure, ModelError
from verst.rollout.hf import HFEngine
from verst.rollout.hf.attention import DecodePlan, attended_length
from verst.rollout.hf.decoder import Decoder
from verst.rollout.hf.model import Passed, SlotModel
from verst.rollout.hf.prompts import HeldPrompts
from verst.types import GenerateRequest, Sampling

ENDLESS: dict[str, Any] = TINY | {"eos_token_id": None}  # a generation ends at its limit
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("llama"), LlamaConfig(**ENDLESS)))


@pytest.fixture
async def engine(llama: str) -> AsyncIterator[HFEngine]:
    async with opening(hf_engine, Path) as start:
        yield await start(llama, max_running=4)


async def refusal(path: str | Path, **options: Any) -> str:
    with pytest.raises((EngineFailure, ModelError)) as caught:
        await hf_engine(path, **options).start()
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4), "layers of kind mamba"),
        (Gemma2Config(**ENDLESS, head_dim=8), "soft-capped"),
        (GptOssConfig(**ENDLESS, head_dim=8, num_local_experts=4, num_experts_per_tok=2), "sinks"),
    ],
)
async def test_models_that_cannot_work_are_refused_by_their_type(tmp_path: Path, config: PreTrainedConfig, reason: str):
    message = await refusal(save_model(tmp_path, config))
    assert repr(config.model_type) in message
    assert reason in message


async def test_a_start_that_cannot_succeed_says_why(tmp_path: Path, llama: str):
    assert str(tmp_path / "nothing") in await refusal(tmp_path / "nothing")
    assert "256" in await refusal(llama, max_model_tokens=257)
    with pytest.raises(EngineFailure, match=r"before start\(\)"):
        await hf_engine(llama).pause()


async def test_an_exception_while_decoding_fails_everything_with_its_cause(engine: HFEngine, monkeypatch: pytest.MonkeyPatch):
    defect = ZeroDivisionError("a defect in the third step")
    steps = 0
    step = Decoder.step

    def failing(decoder: Decoder) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise defect
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", failing)
    answers = await asyncio.gather(*(engine.generate(ask(str(n), prompt(1), max_new_tokens=40)) for n in range(6)), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, EngineFailure)
        assert "a defect in the third step" in str(answer)
        assert answer.__cause__ is defect
    with pytest.raises(EngineFailure, match="a defect in the third step") as caught:
        await engine.generate(ask("later", prompt(1), max_new_tokens=40))
    assert caught.value.__cause__ is defect


async def test_logits_that_are_not_finite_are_never_sampled(engine: HFEngine):
    assert engine._decoder is not None
    engine._decoder._model.model.get_parameter("lm_head.weight").data[7, 0] = torch.nan
    with pytest.raises(EngineFailure, match="version 0 are not finite"):
        await engine.generate(ask("a", prompt(1), max_new_tokens=40))


async def test_a_cancelled_call_ends_its_request(engine: HFEngine):
    await engine.pause()
    call = asyncio.ensure_future(engine.generate(ask("a", prompt(1), max_new_tokens=40)))
    other = asyncio.ensure_future(engine.generate(ask("b", prompt(1), max_new_tokens=40)))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await engine.resume()
    assert len((await other).tokens_T) == 40
    assert engine.stats()["generated_tokens"] == 40


async def test_ids_in_flight_are_unique(engine: HFEngine):
    await engine.pause()
    first = asyncio.ensure_future(engine.generate(ask("a", prompt(1), max_new_tokens=40)))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineFailure, match="'a' is already in flight"):
        await engine.generate(ask("a", prompt(1), max_new_tokens=40))
    await engine.resume()
    await first


async def test_stop_strings_without_a_tokenizer_fail_the_request_alone(engine: HFEngine):
    with pytest.raises(ModelError, match="tokenizer"):
        await engine.generate(GenerateRequest("a", np.array([1], np.int32), Sampling(4, stop=("x",)), seed=0))
    assert len((await engine.generate(ask("b", prompt(1), max_new_tokens=40))).tokens_T) == 40


def test_without_determinism_a_step_computes_only_the_rows_in_use(llama: str, monkeypatch: pytest.MonkeyPatch):
    model = SlotModel(llama, torch.float32, CPU, slots=6, max_tokens=80, exact=False)
    decoder = Decoder(model, llama, version=0)
    lengths = [4, 40, 4, 4, 40, 20]
    for n, length in enumerate(lengths):
        decoder.submit(ask(str(n), np.array([5, n], np.int32), max_new_tokens=length))
    computed: list[int] = []
    decode = SlotModel.decode

    def counting(model: SlotModel, tokens_R: NDArray[np.integer[Any]], *args: Any) -> Passed:
        computed.append(len(tokens_R))
        return decode(model, tokens_R, *args)

    monkeypatch.setattr(SlotModel, "decode", counting)
    finished = {}
    while decoder.has_work:
        finished |= {generation.id: generation for generation in decoder.step()}
    assert computed == [6] * 3 + [3] * 16 + [2] * 20
    # Sequences that moved to another slot went on with their own keys and values.
    for n in range(6):
        whole = np.concatenate((np.array([5, n], np.int32), finished[str(n)].tokens_T))
        np.testing.assert_allclose(finished[str(n)].logprobs_T, model.logprobs(whole)[2:], atol=1e-5)


def test_in_deterministic_mode_rows_fill_whole_vector_blocks(llama: str):
    # 48 numbers in each row of the widest layer and heads of 8: 16 rows make every tensor a multiple of 128, and products agree.
    assert SlotModel(llama, torch.float32, CPU, slots=13, max_tokens=80, exact=True).rows == 16
    assert SlotModel(llama, torch.float32, CPU, slots=13, max_tokens=80, exact=False).rows == 13


def test_rows_attend_to_a_few_lengths_and_see_their_own_positions():
    filled = np.array([0, 63, 64, 127, 128, 150])
    assert [attended_length(filled[: n + 1], 320, rounded=False) for n in range(6)] == [64, 64, 128, 128, 192, 192]
    assert [attended_length(filled[: n + 1], 320, rounded=True) for n in range(6)] == [64, 64, 128, 128, 256, 256]
    assert attended_length(np.array([299]), 320, rounded=True) == 320
    plan = DecodePlan(torch.from_numpy(filled), 192, torch.float32)
    assert plan.mask(None).shape == (6, 1, 1, 192)
    assert (plan.mask(None) == 0).sum(-1).flatten().tolist() == [1, 64, 65, 128, 129, 151]
    windowed = plan.mask(10)
    assert (windowed == 0).sum(-1).flatten().tolist() == [1, 10, 10, 10, 10, 10]
    assert windowed[5, 0, 0, 141:151].tolist() == [0] * 10


def test_held_prompts_are_found_until_their_last_slot_is_taken():
    held = HeldPrompts(3)
    passed = Passed(torch.zeros(2))
    held.put(0, b"a", passed)
    held.put(1, b"a", passed)
    held.put(0, b"b", passed)
    found = held.find(b"a")
    assert found is not None
    assert found[0] == 1
    held.move(1, 2)
    found = held.find(b"a")
    assert found is not None
    assert found[0] == 2
    assert not held.holds(1, b"a")
    held.put(2, b"b", passed)
    assert held.find(b"a") is None
    held.clear()
    assert held.find(b"b") is None


async def test_memory_that_is_given_up_is_really_free(engine: HFEngine):
    await engine.generate(ask("a", prompt(1)))
    assert engine._decoder is not None
    model = engine._decoder._model
    weights = [parameter.untyped_storage() for parameter in model.model.parameters()]
    before = sum(storage.nbytes() for storage in weights)
    assert before > 0
    assert model.cache._layers
    await engine.pause()
    await engine.release_memory(weights=False)
    assert not model.cache._layers
    assert sum(storage.nbytes() for storage in weights) == before
    await engine.release_memory()
    assert sum(storage.nbytes() for storage in weights) == 0
    await engine.resume_memory()
    assert sum(storage.nbytes() for storage in weights) == before
