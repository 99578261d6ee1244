"""What every engine that records expert routes promises: a row is of the pass whose logits gave the next token.

The references are transformers' own router scores. In float32 every row must be equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.contracts.engine_cases import (
    MAX_TOKENS,
    SERVED,
    SGLANG,
    Update,
    hf_engine,
    load,
    opening,
    perturbed,
    prompt,
    reached,
    reference_logprobs,
    save_model,
)
from tests.contracts.route_cases import DENSE_FIRST, KIND, asked, computed_routes, generated, joined, rows_of
from verst.protocols import Engine
from verst.rollout.sglang import SGLangEngine
from verst.types import FinishReason, GenerateRequest, Generation, PauseMode, RoutedExperts


@pytest.fixture
def model(models: Callable[[str], Path]) -> Path:
    return models("routed")


@pytest.fixture
async def sglang(servers: Callable[[str], Any]) -> AsyncIterator[SGLangEngine]:
    """On a server that takes long prompts in chunks of 16 tokens, and admits more requests than it has memory for."""
    from tests.contracts.sglang_server import attached

    async with attached(servers("routed"), record_routes=True) as made:
        yield made


@pytest.fixture(params=SERVED)
async def engine(request: pytest.FixtureRequest, models: Callable[[str], Path], servers: Callable[[str], Any]) -> AsyncIterator[Engine]:
    if request.param == SGLANG:
        from tests.contracts.sglang_server import attached

        async with attached(servers("routed"), record_routes=True) as made:
            yield made
        return
    async with opening(partial(hf_engine, version=3, record_routes=True), models) as start:
        yield await start("routed")


def changed(model: Path, version: int = 4) -> tuple[Update, torch.nn.Module]:
    """Other weights, and the transformers model that has them."""
    update = Update(perturbed(model), version)
    reference = load(model)
    reference.load_state_dict(dict(update.tensors()), strict=False)
    return update, reference


async def test_rows_are_those_of_transformers(engine: Engine, model: Path):
    """Prompts of 3 to 59 tokens: the longer ones are several chunks of a prefill."""
    requests = [asked(str(n), prompt(n, length=3 + 8 * n), seed=n, max_new_tokens=60, temperature=0.8) for n in range(8)]
    answers = await asyncio.gather(*(generated(engine, request) for request in requests))
    assert max(len(answer.tokens_T) for answer in answers) > 30
    reference = load(model)
    for request, answer in zip(requests, answers, strict=True):
        whole = joined(request, answer)
        np.testing.assert_array_equal(answer.experts_RLK, computed_routes(whole, (reference, len(whole) - 1)))


async def test_turns_and_an_abort_add_rows_to_those_that_are_known(engine: Engine, model: Path):
    """An aborted generation is continued from its tokens, then a second turn follows it; each request asks for the rows not yet known."""
    first = asked("a", prompt(5), max_new_tokens=120, temperature=1.5)
    answers = [asyncio.ensure_future(generated(engine, first))]
    await asyncio.sleep(0.05)
    await engine.abort(["a"])
    pieces = [await answers[0]]
    tokens = joined(first, *pieces)
    known = sum(len(rows) for rows in [rows_of(pieces)]) if len(pieces[0].tokens_T) else 0
    for id, given in (("b", 0), ("c", 7)):
        tokens = np.concatenate((tokens, prompt(9, length=given)))
        pieces.append(await generated(engine, asked(id, tokens, known, max_new_tokens=9, temperature=1.5)))
        tokens = np.concatenate((tokens, pieces[-1].tokens_T))
        known = len(tokens) - 1
    np.testing.assert_array_equal(rows_of(pieces), computed_routes(tokens, (load(model), len(tokens) - 1)))


async def test_nothing_is_recorded_that_was_not_asked_for_or_generated(engine: Engine):
    from tests.contracts.engine_cases import ask

    assert (await engine.generate(ask("a", prompt(1)))).experts_RLK is None
    await engine.pause()
    waiting = asyncio.ensure_future(generated(engine, asked("b", prompt(1))))
    await asyncio.sleep(0.02)
    await engine.abort()
    found = await waiting
    assert found.finish is FinishReason.ABORT
    assert found.experts_RLK is not None
    assert found.experts_RLK.shape == (0, KIND.layers, KIND.chosen)
    await engine.resume()


async def flying(engine: Engine, requests: list[GenerateRequest]) -> list[asyncio.Task[Generation]]:
    """Requests that are paused with some tokens and want more."""
    async with asyncio.timeout(60):
        while True:
            before = engine.stats()["generated_tokens"]
            answers = [asyncio.ensure_future(generated(engine, request)) for request in requests]
            if isinstance(engine, SGLangEngine):
                await reached(engine, "running", len(requests))
                await asyncio.sleep(0.06)
            else:
                await reached(engine, "generated_tokens", before + 4 * len(requests))
            await engine.pause()
            cut = [not answer.done() for answer in answers]
            if all(cut) and (not isinstance(engine, SGLangEngine) or all(run.tokens for run in engine._runs.values())):
                return answers
            await engine.abort()
            await engine.resume()
            await asyncio.gather(*answers)


async def test_after_an_update_in_flight_rows_are_of_the_new_weights(engine: Engine, model: Path):
    """Those before are of the old ones, and the keys and values of the tokens before are kept."""
    requests = [asked(str(n), prompt(n), seed=n, max_new_tokens=100, temperature=1.5) for n in range(4)]
    answers = await flying(engine, requests)
    update, newer = changed(model)
    await engine.update_weights(update)
    await engine.resume()
    older = load(model)
    differing = 0
    for request, answer in zip(requests, await asyncio.gather(*answers), strict=True):
        whole, last = joined(request, answer), len(answer.tokens_T)
        given = len(request.tokens_T) + int((answer.versions_T == 3).sum())
        assert {3, 4} == set(answer.versions_T[:last])
        expected = computed_routes(whole, (older, given - 1), (newer, len(whole) - 1))
        np.testing.assert_array_equal(answer.experts_RLK, expected)
        differing += int((expected != computed_routes(whole, (older, len(whole) - 1))).sum())
    assert differing > 20  # else the weights' routes say nothing


# ---- what SGLang's caches do


@pytest.mark.slow
async def test_rows_of_tokens_that_were_found_in_the_prefix_cache(sglang: SGLangEngine, model: Path):
    request = asked("first", prompt(2, length=40), max_new_tokens=20)
    await generated(sglang, request)
    cold = sglang.stats()["prefill_tokens"]
    again = asked("second", prompt(2, length=40), max_new_tokens=20, temperature=1.5)
    answer = await generated(sglang, again)
    assert sglang.stats()["prefill_tokens"] - cold <= 2
    whole = joined(again, answer)
    np.testing.assert_array_equal(answer.experts_RLK, computed_routes(whole, (load(model), len(whole) - 1)))


@pytest.mark.slow
async def test_a_retracting_pause_computes_anew_by_the_weights_of_then(sglang: SGLangEngine, model: Path):
    requests = [asked(str(n), prompt(n), max_new_tokens=100, temperature=1.5) for n in range(3)]
    answers = await flying(sglang, requests)
    await sglang.pause(PauseMode.RETRACT)
    update, newer = changed(model)
    await sglang.update_weights(update)
    await sglang.resume()
    for request, answer in zip(requests, await asyncio.gather(*answers), strict=True):
        whole = joined(request, answer)
        given = len(request.tokens_T) + int((answer.versions_T == 3).sum())
        before, after = (computed_routes(whole, (by, len(whole) - 1)) for by in (load(model), newer))
        np.testing.assert_array_equal(answer.experts_RLK, np.concatenate((before[: given - 1], after[given - 1 :])))


@pytest.mark.slow
async def test_a_sibling_in_the_prefix_cache_does_not_lend_its_row(sglang: SGLangEngine, model: Path):
    """A sibling left the same tokens there, with the routes of the older weights. The pass that samples is of the newer ones."""
    prompts = [prompt(40 + n) for n in range(3)]
    for n, tokens in enumerate(prompts):
        await sglang.generate(asked(f"sibling{n}", tokens, temperature=0.0, max_new_tokens=80))
    requests = [asked(str(n), tokens, temperature=0.0, max_new_tokens=80) for n, tokens in enumerate(prompts)]
    answers = await flying(sglang, requests)
    update, newer = changed(model)
    await sglang.update_weights(update)
    await sglang.resume()
    older = load(model)
    lent = 0
    for request, answer in zip(requests, await asyncio.gather(*answers), strict=True):
        whole = joined(request, answer)
        given = len(request.tokens_T) + int((answer.versions_T == 3).sum())
        sampled = computed_routes(whole, (older, given - 1), (newer, given))[given - 1]
        then = computed_routes(whole, (older, given), (newer, len(whole) - 1))  # from the sibling's keys and values
        assert answer.experts_RLK is not None
        np.testing.assert_array_equal(answer.experts_RLK[: given - 1], then[: given - 1])
        np.testing.assert_array_equal(answer.experts_RLK[given - 1], sampled)
        np.testing.assert_array_equal(answer.experts_RLK[given:], then[given:])
        lent += int((sampled != then[given - 1]).any())
    assert lent  # else the older row would have passed as well


@pytest.mark.slow
async def test_rows_after_sglang_retracted_a_request_for_want_of_memory(sglang: SGLangEngine, model: Path, monkeypatch: pytest.MonkeyPatch):
    """It computes keys, values and routes of all of its tokens anew, by the same weights."""
    retractions: list[int] = []
    api, generate = sglang._api, sglang._api.generate

    async def counted(body: Any, deadline_s: float) -> dict[str, Any]:
        answer = await generate(body, deadline_s)
        retractions.append(answer["meta_info"]["num_retractions"])
        return answer

    monkeypatch.setattr(api, "generate", counted)
    requests = [asked(str(n), prompt(n), max_new_tokens=MAX_TOKENS - 9) for n in range(6)]
    answers = await asyncio.gather(*(generated(sglang, request) for request in requests))
    assert sum(retractions) > 0
    reference = load(model)
    for request, answer in zip(requests, answers, strict=True):
        whole = joined(request, answer)
        np.testing.assert_array_equal(answer.experts_RLK, computed_routes(whole, (reference, len(whole) - 1)))


@pytest.mark.slow
async def test_a_dense_first_layer_has_no_rows(tmp_path: Path):
    """GLM-4.5's kind: SGLang sends rows for all layers, and a bias takes part in the choice of experts."""
    from tests.contracts.sglang_server import shared_server

    path = save_model(tmp_path / "model", DENSE_FIRST)
    request = asked("a", prompt(1, length=20), max_new_tokens=30)
    with shared_server(path, tmp_path, record_routes=True) as running:
        engine = running.engine(record_routes=True)
        await engine.start()
        assert engine.routed_experts == RoutedExperts(layers=2, experts=6, chosen=2)
        answer = await engine.generate(request)
        await engine.close()
    reference, scores = load(path), []
    gates = [layer.mlp.gate for layer in reference.model.layers[1:]]  # type: ignore[union-attr, index]
    for gate in gates:
        gate.register_forward_hook(lambda gate, _, logits: scores.append(logits.sigmoid() + gate.e_score_correction_bias))
    whole = joined(request, answer)
    np.testing.assert_allclose(answer.logprobs_T, reference_logprobs(reference, whole)[19:], atol=2e-5)
    expected = np.sort(torch.stack([each.topk(2).indices for each in scores], 1).numpy(), -1)
    assert answer.experts_RLK is not None
    np.testing.assert_array_equal(np.sort(answer.experts_RLK, -1), expected[: len(whole) - 1])
