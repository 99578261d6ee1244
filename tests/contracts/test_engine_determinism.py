"""A sequence's bits depend on weights, tokens and seed alone, for every `Engine` in deterministic mode."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.contracts.engine_cases import (
    Opened,
    ask,
    paused,
    prompt,
    same,
)
from verst.protocols import Engine
from verst.types import GenerateRequest, Generation


async def test_an_aborted_generation_can_be_continued_to_the_same_end(opened: Opened):
    engine = await opened()
    whole = await engine.generate(ask("whole", prompt(4), seed=9, max_new_tokens=20))
    head = await engine.generate(ask("head", prompt(4), seed=9, max_new_tokens=5))
    tail = await engine.generate(ask("tail", np.concatenate((prompt(4), head.tokens_T)), seed=9, max_new_tokens=15))
    np.testing.assert_array_equal(np.concatenate((head.tokens_T, tail.tokens_T)), whole.tokens_T)


@pytest.mark.slow
async def test_a_sequence_has_the_same_bits_whatever_runs_beside_it(opened: Opened):
    """Random schedules: other neighbours, lengths, arrival times, slots and loads. Exact equality of tokens and log-probabilities."""
    rng = np.random.default_rng(11)
    watched = [
        ask(f"watched{n}", prompt(n, length=length), seed=n, max_new_tokens=80, top_p=top_p)
        for n, (length, top_p) in enumerate([(1, 1.0), (9, 0.9), (50, 1.0), (62, 1.0), (9, 1.0)])
    ]
    quiet = await opened(max_running=13)
    expected = [await quiet.generate(request) for request in watched]
    assert max(len(answer.tokens_T) for answer in expected) > 40
    for trial in range(4):
        engine = await opened(max_running=13)
        noise = [
            ask(
                f"noise{n}",
                prompt(trial, n, length=int(rng.integers(1, 90))),
                seed=n,
                max_new_tokens=int(rng.integers(1, 70)),
                top_k=int(k),
            )
            for n, k in enumerate(rng.integers(0, 5, int(rng.integers(1, 40))))
        ]
        everything = [*watched, *noise]
        order = rng.permutation(len(everything))

        async def arrive(index: int, delay_s: float, engine: Engine = engine, everything: list[GenerateRequest] = everything) -> Generation:
            await asyncio.sleep(delay_s)
            return await engine.generate(everything[index])

        answers = await asyncio.gather(*(arrive(int(index), float(rng.uniform(0, 0.1))) for index in order))
        by_id = {answer.id: answer for answer in answers}
        for request, known in zip(watched, expected, strict=True):
            assert same(by_id[request.id], known), f"trial {trial}: {request.id} differs"


@pytest.mark.parametrize("model", ["qwen3_sliding", "qwen3_moe", "olmoe"])
async def test_other_architectures_have_the_same_bits_in_company(opened: Opened, model: str):
    engine = await opened(model, max_running=7)
    watched = ask("watched", prompt(1), seed=1, max_new_tokens=70)
    alone = await engine.generate(watched)
    noise = [ask(f"n{n}", prompt(n, length=5 * n + 1), seed=n, max_new_tokens=10 + 9 * n) for n in range(10)]
    crowd = await asyncio.gather(*(engine.generate(request) for request in [*noise, watched]))
    assert same(alone, crowd[-1])


async def test_members_of_a_group_prefill_their_prompt_once(opened: Opened):
    engine = await opened(max_running=4)
    alone = await engine.generate(ask("alone", prompt(8), seed=5))
    assert engine.stats()["prefill_tokens"] == 9
    async with paused(engine):
        answers = [asyncio.ensure_future(engine.generate(ask(str(s), prompt(1), seed=s))) for s in range(4)]
        other = asyncio.ensure_future(engine.generate(ask("other", prompt(8), seed=5)))
        await asyncio.sleep(0.05)
    await asyncio.gather(*answers)
    assert same(await other, alone)
    assert engine.stats()["prefill_tokens"] == 9 + 9 + 9  # four members share one; the first prompt's slot was taken meanwhile
