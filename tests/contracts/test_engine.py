"""What every `Engine` promises about generating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.contracts.engine_cases import (
    CONFIGS,
    DENSE,
    EOS,
    MAX_TOKENS,
    VOCAB,
    Opened,
    ask,
    load,
    paused,
    prompt,
    reached,
    reference_logprobs,
    same,
)
from verst.errors import EngineFailure
from verst.types import FinishReason, Generation


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("model", list(CONFIGS))
async def test_logprobs_agree_with_a_full_forward_pass(opened: Opened, models: Callable[[str], Path], model: str, deterministic: bool):
    engine = await opened(model, deterministic=deterministic)
    requests = [ask(str(n), prompt(n, length=3 + 4 * n), seed=n, max_new_tokens=70, temperature=0.8) for n in range(8)]
    reference = load(models(model))
    answers = await asyncio.gather(*map(engine.generate, requests))
    assert max(len(answer.tokens_T) for answer in answers) > 30
    for request, answer in zip(requests, answers, strict=True):
        whole = np.concatenate((request.tokens_T, answer.tokens_T))
        expected = reference_logprobs(reference, whole, 0.8)[len(request.tokens_T) - 1 :]
        np.testing.assert_allclose(answer.logprobs_T, expected, atol=1e-5)
        assert (answer.versions_T == 3).all()


@pytest.mark.parametrize("deterministic", [True, False])
async def test_bfloat16_logprobs_are_of_the_bfloat16_model(opened: Opened, models: Callable[[str], Path], deterministic: bool):
    engine = await opened(dtype="bfloat16", deterministic=deterministic)
    reference = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.bfloat16).eval()
    answer = await engine.generate(ask("a", prompt(1), max_new_tokens=30))
    whole = np.concatenate((prompt(1), answer.tokens_T))
    with torch.no_grad():
        logits = reference(input_ids=torch.from_numpy(whole.astype(np.int64))[None]).logits[0, 8:-1].float()
    expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(answer.tokens_T.astype(np.int64))[:, None])[:, 0]
    assert np.abs(answer.logprobs_T - expected.numpy()).mean() < 0.05


async def test_greedy_follows_the_most_likely_token_with_logprob_zero(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    answer = await engine.generate(ask("a", prompt(2), temperature=0.0, max_new_tokens=20))
    tokens = list(prompt(2))
    reference = load(models(DENSE))
    for token in answer.tokens_T:
        with torch.no_grad():
            assert token == int(reference(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(int(token))
    assert (answer.logprobs_T == 0).all()


async def test_the_probe_agrees_with_a_full_forward_pass_also_while_paused(served: Opened, models: Callable[[str], Path]):
    engine = await served()
    tokens = prompt(3, length=40)
    async with paused(engine):
        found = await engine.logprobs(tokens)
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], reference_logprobs(load(models(DENSE)), tokens), atol=1e-5)


async def test_a_finished_sequence_makes_room_at_the_next_step(opened: Opened):
    engine = await opened(max_running=2)
    # One long request holds a slot while five short ones pass through the other: 5 × 4 = 20 tokens beside 20.
    async with paused(engine):
        # Greedy, which happens not to say end-of-sequence here; the counts below would show it.
        requests = [ask(str(n), prompt(n), max_new_tokens=20 if n == 1 else 4, temperature=0.0) for n in range(1, 7)]
        answers = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        await reached(engine, "waiting", 6)
    await asyncio.gather(*answers)
    # The first token of a request comes from its prefill, so the long one needs 19 decode steps, and nothing ran beyond it.
    assert engine.stats()["decode_steps"] == 19
    assert engine.stats()["generated_tokens"] == 40
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


async def test_seeds_decide_the_tokens(opened: Opened):
    engine = await opened()
    one, again, other = await asyncio.gather(*(engine.generate(ask(f"{n}", prompt(1), seed=s)) for n, s in enumerate((7, 7, 8))))
    assert same(one, again)
    assert not same(one, other)


async def test_abort_returns_the_tokens_so_far(opened: Opened):
    engine = await opened(max_running=2)
    whole = await engine.generate(ask("whole", prompt(1), max_new_tokens=100, temperature=0.0))
    before = engine.stats()["generated_tokens"]
    answers = [asyncio.ensure_future(engine.generate(ask(str(n), prompt(1), max_new_tokens=100, temperature=0.0))) for n in range(3)]
    await reached(engine, "generated_tokens", before + 10)
    await engine.pause()
    await engine.abort(["0", "2"])
    cut, waiting = await answers[0], await answers[2]
    assert cut.finish == waiting.finish == FinishReason.ABORT
    assert 5 <= len(cut.tokens_T) < len(whole.tokens_T)
    np.testing.assert_array_equal(cut.tokens_T, whole.tokens_T[: len(cut.tokens_T)])
    assert len(waiting.tokens_T) == 0
    assert not answers[1].done()
    await engine.resume()
    assert same(await answers[1], whole)


async def test_what_is_in_flight_is_what_an_abort_would_return(served: Opened):
    engine = await served(max_running=2)
    answers = [asyncio.ensure_future(engine.generate(ask(str(n), prompt(1), max_new_tokens=100, temperature=0.0))) for n in range(2)]
    so_far: dict[str, Generation] = {}
    async with asyncio.timeout(60):
        while len(so_far) < 2:  # one that is paused before its first token has nothing
            await asyncio.sleep(0.02)
            await engine.pause()
            so_far = {generation.id: generation for generation in await engine.in_flight()}
            await engine.resume()
    await engine.pause()
    so_far = {generation.id: generation for generation in await engine.in_flight()}
    await asyncio.sleep(0.05)
    assert not any(answer.done() for answer in answers)
    await engine.abort()
    cut = await asyncio.gather(*answers)
    assert all(len(answer.tokens_T) for answer in cut)
    assert all(same(so_far[answer.id], answer) for answer in cut)
    assert all((so_far[answer.id].versions_T == answer.versions_T).all() for answer in cut)
    assert list(await engine.in_flight()) == []


async def test_a_request_that_goes_on_from_tokens_draws_as_the_whole_would_have(opened: Opened):
    engine = await opened(deterministic=True)
    whole = await engine.generate(ask("whole", prompt(1), seed=5, max_new_tokens=60))
    for had in (1, 17, 59):
        rest = ask(f"from {had}", np.concatenate((prompt(1), whole.tokens_T[:had])), seed=5, max_new_tokens=60 - had)
        (answer,) = await asyncio.gather(engine.generate(rest))
        assert answer.tokens_T.tobytes() == whole.tokens_T[had:].tobytes()
        assert answer.logprobs_T.tobytes() == whole.logprobs_T[had:].tobytes()


async def test_abort_without_ids_ends_everything(served: Opened):
    engine = await served(max_running=1)
    await engine.pause()
    answers = [asyncio.ensure_future(engine.generate(ask(str(n), prompt(n)))) for n in range(3)]
    await asyncio.sleep(0.05)
    await engine.abort()
    assert {answer.finish for answer in await asyncio.gather(*answers)} == {FinishReason.ABORT}


async def test_a_pause_stops_and_resume_goes_on_where_it_was(opened: Opened):
    engine = await opened()
    undisturbed = await engine.generate(ask("a", prompt(1), seed=1, max_new_tokens=60))
    before = int(engine.stats()["generated_tokens"])
    answer = asyncio.ensure_future(engine.generate(ask("b", prompt(1), seed=1, max_new_tokens=60)))
    await reached(engine, "generated_tokens", before + 5)
    async with paused(engine):
        count = engine.stats()["generated_tokens"]
        await asyncio.sleep(0.05)
        assert engine.stats()["generated_tokens"] == count
    assert same(await answer, undisturbed)


async def test_stop_tokens_and_strings_end_a_generation_and_are_kept(opened: Opened):
    engine = await opened()
    free = await engine.generate(ask("free", prompt(1), seed=3, max_new_tokens=30))
    fourth = int(free.tokens_T[3])
    first = int(np.flatnonzero(free.tokens_T == fourth)[0])
    by_id = await engine.generate(ask("id", prompt(1), seed=3, max_new_tokens=30, stop_token_ids=(1000, fourth)))
    by_text = await engine.generate(ask("text", prompt(1), seed=3, max_new_tokens=30, stop=("nothing", f"w{fourth} w{free.tokens_T[4]}")))
    np.testing.assert_array_equal(by_id.tokens_T, free.tokens_T[: first + 1])
    np.testing.assert_array_equal(by_text.tokens_T, free.tokens_T[:5])
    assert by_id.finish == by_text.finish == FinishReason.STOP


async def test_the_end_of_sequence_token_of_the_model_ends_a_generation(served: Opened):
    engine = await served()
    answers = await asyncio.gather(*(engine.generate(ask(str(s), prompt(1), seed=s, max_new_tokens=100)) for s in range(20)))
    assert any(answer.finish is FinishReason.STOP for answer in answers)
    for answer in answers:
        assert EOS not in answer.tokens_T[:-1]
        assert (answer.tokens_T[-1] == EOS) == (answer.finish is FinishReason.STOP)


async def test_limits_end_a_generation_or_refuse_it(served: Opened):
    engine = await served()
    short = await engine.generate(ask("short", prompt(1), max_new_tokens=3, temperature=0.0))
    assert (len(short.tokens_T), short.finish) == (3, FinishReason.LENGTH)
    context = await engine.generate(ask("context", prompt(1, length=MAX_TOKENS - 4), max_new_tokens=50, temperature=0.0))
    assert (len(context.tokens_T), context.finish) == (4, FinishReason.LENGTH)
    with pytest.raises(EngineFailure, match=f"{MAX_TOKENS} tokens.*{MAX_TOKENS - 1}"):
        await engine.generate(ask("long", prompt(1, length=MAX_TOKENS)))
    with pytest.raises(EngineFailure, match="64"):
        await engine.generate(ask("vocabulary", np.array([1, VOCAB], np.int32)))


async def test_close_fails_what_is_pending_and_every_later_call(served: Opened):
    engine = await served()
    await engine.pause()
    answer = asyncio.ensure_future(engine.generate(ask("a", prompt(1))))
    await asyncio.sleep(0.05)
    await engine.close()
    with pytest.raises(EngineFailure, match="closed"):
        await answer
    with pytest.raises(EngineFailure, match="closed"):
        await engine.generate(ask("b", prompt(1)))
    await engine.close()
