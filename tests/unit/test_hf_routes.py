"""Routes recorded by the `hf` engine: through shared prompts, copied and moved slots and loans of memory."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, PhimoeConfig

from tests.contracts.engine_cases import (
    CONFIGS,
    ROUTED,
    TINY,
    Opened,
    Update,
    hf_engine,
    load,
    opening,
    paused,
    perturbed,
    prompt,
    reached,
    save_model,
)
from tests.contracts.route_cases import asked, computed_routes, generated, joined
from verst.config.schema import Config
from verst.errors import EngineFailure
from verst.rollout.engines import make_engine
from verst.rollout.hf import HFEngine
from verst.rollout.hf.model import SlotModel
from verst.types import RoutedExperts

ENDLESS = copy.deepcopy(ROUTED)
ENDLESS.eos_token_id = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("routed"), ENDLESS)


@pytest.fixture
async def opened(model: Path) -> AsyncIterator[Opened]:
    async with opening(partial(hf_engine, version=3, record_routes=True), lambda _: model) as start:
        yield start


@pytest.mark.parametrize("deterministic", [False, True])
async def test_members_of_a_group_share_the_rows_of_their_prompt(opened: Opened, model: Path, deterministic: bool):
    """Six of one prompt and two others in four slots, of lengths that make sequences move to other slots and prompts be copied."""
    engine = await opened(max_running=4, deterministic=deterministic)
    lengths = [30, 3, 17, 40, 9, 25]
    requests = [asked(str(n), prompt(1), seed=n, max_new_tokens=count, temperature=1.5) for n, count in enumerate(lengths)]
    requests += [asked(f"other{n}", prompt(2, n), n, seed=n, max_new_tokens=20) for n in range(2)]
    async with paused(engine):
        answers = [asyncio.ensure_future(generated(engine, request)) for request in requests]
        await asyncio.sleep(0.05)
    found = await asyncio.gather(*answers)
    assert engine.stats()["prefill_tokens"] == 9 * 3
    reference = load(model)
    for request, answer in zip(requests, found, strict=True):
        whole = joined(request, answer)
        np.testing.assert_array_equal(answer.experts_RLK, computed_routes(whole, (reference, len(whole) - 1))[request.routes_from :])


@pytest.mark.parametrize("deterministic", [False, True])
async def test_a_loan_of_memory_changes_no_row_of_tokens_that_were_sampled(opened: Opened, model: Path, deterministic: bool):
    """Their keys and values are computed anew by newer weights, but those did not sample what followed them."""
    engine = await opened(max_running=4, deterministic=deterministic)
    requests = [asked(str(n), prompt(max(n, 1)), seed=n, max_new_tokens=40, temperature=1.5) for n in range(4)]
    answers = [asyncio.ensure_future(generated(engine, request)) for request in requests]
    await reached(engine, "generated_tokens", 20)
    update = Update(perturbed(model), version=4)
    await engine.pause()
    await engine.release_memory()
    await engine.resume_memory()
    await engine.update_weights(update)
    await engine.resume()
    older, newer = load(model), load(model)
    newer.load_state_dict(dict(update.tensors()), strict=False)
    differing = 0
    for request, answer in zip(requests, await asyncio.gather(*answers), strict=True):
        whole = joined(request, answer)
        given = len(request.tokens_T) + int((answer.versions_T == 3).sum())
        before, after = (computed_routes(whole, (by, len(whole) - 1)) for by in (older, newer))
        np.testing.assert_array_equal(answer.experts_RLK, np.concatenate((before[: given - 1], after[given - 1 :])))
        differing += int((before != after)[: given - 1].sum())
    assert differing > 20  # else it would not matter which rows were kept


async def test_after_new_weights_the_same_prompt_has_new_rows(opened: Opened, model: Path):
    engine = await opened()
    before = await generated(engine, asked("a", prompt(1)))
    update = Update(perturbed(model), version=4)
    async with paused(engine):
        await engine.update_weights(update)
    after = await generated(engine, asked("b", prompt(1)))
    newer = load(model)
    newer.load_state_dict(dict(update.tensors()), strict=False)
    np.testing.assert_array_equal(after.experts_RLK, computed_routes(joined(asked("", prompt(1)), after), (newer, 20)))
    assert before.experts_RLK is not None
    assert after.experts_RLK is not None
    assert (before.experts_RLK[:9] != after.experts_RLK[:9]).any()


@torch.inference_mode()
def test_the_rows_of_a_pass_come_out_of_it_as_a_value(model: Path):
    """As a recorded graph needs it: nothing that the forward pass leaves in Python may be read, only what it returns."""
    slots = SlotModel(str(model), torch.float32, torch.device("cpu"), slots=3, max_tokens=40, exact=False, record_routes=True)
    first, second = slots.prefill(prompt(1), 0), slots.prefill(prompt(2), 1)
    reference = load(model)
    for passed, tokens in ((first, prompt(1)), (second, prompt(2))):
        assert passed.experts_NLK is not None
        assert passed.experts_NLK.dtype == torch.uint8
        np.testing.assert_array_equal(np.sort(passed.experts_NLK.numpy(), -1), computed_routes(tokens, (reference, 9)))
    decoded = slots.decode(np.array([5, 6]), np.array([9, 9]), np.array([True, True]))
    for row, tokens in enumerate((prompt(1), prompt(2))):
        expected = computed_routes(np.append(tokens, 5 + row).astype(np.int32), (reference, 10))[-1]
        assert decoded.experts_NLK is not None
        np.testing.assert_array_equal(np.sort(decoded.experts_NLK[row].numpy(), -1), expected)


async def test_more_than_256_experts_take_two_bytes(tmp_path: Path):
    path = save_model(tmp_path, OlmoeConfig(**TINY, num_experts=300, num_experts_per_tok=2))
    async with opening(partial(hf_engine, record_routes=True), Path) as start:
        engine = await start(str(path))
        assert engine.routed_experts == RoutedExperts(2, 300, 2)
        found = (await engine.generate(asked("a", prompt(1)))).experts_RLK
    assert found is not None
    assert (found.dtype, found.shape) == (np.int16, (20, 2, 2))
    assert found.max() > 255


async def test_a_model_whose_routers_cannot_be_followed_is_refused(tmp_path: Path):
    path = save_model(tmp_path, PhimoeConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    with pytest.raises(EngineFailure, match=r"PhimoeForCausalLM.*routes cannot be followed.*train\.routes=ignore"):
        await hf_engine(path, record_routes=True).start()


async def test_a_dense_model_and_an_engine_that_need_not_record_do_nothing(tmp_path: Path, model: Path):
    dense = save_model(tmp_path, CONFIGS["qwen3"])
    for path, record in ((dense, True), (model, False)):
        async with opening(partial(hf_engine, record_routes=record), Path) as start:
            engine = await start(str(path))
            assert engine.routed_experts is None
            assert engine._decoder is not None
            assert engine._decoder._routes is None
            assert engine._decoder._model.tap is None
            assert (await engine.generate(asked("a", prompt(1)))).experts_RLK is None


@pytest.mark.parametrize(
    ("changes", "records"),
    [
        ({}, True),
        ({"train": {"routes": "record"}}, True),
        ({"train": {"routes": "ignore"}}, False),
        ({"algorithm": {"name": "sft"}}, False),
    ],
)
def test_what_a_run_file_says_about_recording(tmp_path: Path, changes: dict[str, Any], records: bool):
    config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "run": {"steps": 1}} | changes)
    engine = make_engine(config, slot=0, device="cpu", shared=False, log=tmp_path / "log")
    assert isinstance(engine, HFEngine)
    assert engine._record_routes is records
