"""Rollout functions: what they are given, what they may do, and that only what the engine sampled is trained."""

from __future__ import annotations

import asyncio
import re
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_roll import END, PROMPT, TOKENIZER, ids, roller
from verst.data.chat import ChatRenderer
from verst.errors import EngineFailure, ExtensionError
from verst.rollout import rollouts_contract
from verst.rollout.environments import environment_factory
from verst.rollout.recorded import Recorded
from verst.rollout.rollouts import Rollouts
from verst.rollout.sessions import SessionRefused
from verst.rollout.tokens import TokenSession
from verst.testing import FakeEngine, check_rollout, tiny_tokenizer
from verst.types import NO_VERSION, FinishReason, Message, Prompt, Status, Trajectory, Turn

OPENING = ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n")


async def rolled(engine: Any, function: Any, prompt: Prompt = PROMPT, **changes: Any) -> Trajectory:
    changes = {"max_turns": 3} | changes
    (trajectory,) = (await roller(engine, Rollouts(function), **changes).roll(3, prompt)).trajectories
    return trajectory


async def budget(session: TokenSession, prompt: Prompt, thought: int = 3) -> dict[str, Any]:
    """Thinks for a few tokens, is told to answer, and answers."""
    tokens = session.opening(prompt.messages)
    first = await session.generate(tokens, max_new_tokens=thought)
    second = await session.generate([*session.tokens, *session.encode("</think>")])
    return {"thought": first.text, "answer": second.text, "room": session.room, "turns_left": session.turns_left}


async def test_what_is_trained_is_what_the_engine_sampled():
    engine = FakeEngine([ids("hm hm hm"), [*ids("42"), END]])
    trajectory = await rolled(engine, budget)
    between = ids("</think>")
    assert trajectory.tokens_T.tolist() == [*OPENING, *ids("hm "), *between, *ids("42"), END]
    mask = [False] * len(OPENING) + [True] * 3 + [False] * len(between) + [True] * 3
    assert trajectory.loss_mask_T.tolist() == mask
    expected = [FakeEngine.logprob(t) if m else 0.0 for t, m in zip(trajectory.tokens_T, mask, strict=True)]
    assert trajectory.logprobs_T.tolist() == expected
    assert trajectory.versions_T.tolist() == [0 if m else NO_VERSION for m in mask]
    first_end = len(OPENING) + 3
    assert trajectory.turns == (
        Turn(0, len(OPENING), first_end, FinishReason.LENGTH, "hm "),
        Turn(first_end, first_end + len(between), len(mask), FinishReason.STOP, "42"),
    )
    assert trajectory.status is Status.FINISHED
    assert trajectory.info == {"thought": "hm ", "answer": "42", "room": 256 - len(mask), "turns_left": 1}
    assert [m.content for m in trajectory.messages] == ["6x7?", "hm ", "</think>", "42"]
    assert [request.sampling.max_new_tokens for request in engine.requests] == [3, 16]


async def test_the_seeds_are_those_of_any_trajectory():
    engines = FakeEngine([ids("ab"), [*ids("42"), END]]), FakeEngine([ids("ab"), [*ids("42"), END]])
    for engine in engines:
        await rolled(engine, budget, group_size=1)
    assert [r.seed for r in engines[0].requests] == [r.seed for r in engines[1].requests]
    assert len({r.seed for r in engines[0].requests}) == 2


async def test_the_completion_has_its_log_probabilities_and_stop_strings_may_be_given():
    async def one(session: TokenSession, prompt: Prompt) -> dict[str, Any]:
        found = await session.generate(session.opening(prompt.messages), stop=["!"])
        return {"logprobs": list(found.logprobs), "spans": [list(span) for span in session.generated]}

    engine = FakeEngine([[7, 8]])
    trajectory = await rolled(engine, one)
    assert trajectory.info == {"logprobs": [-1 / 8, -2 / 8], "spans": [[len(OPENING), len(OPENING) + 2]]}
    assert engine.requests[0].sampling.stop == ("!",)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda s: [*s.tokens[:-1], 65], r"differ at place \d+ from the \d+ that were given and generated"),
        (lambda s: s.tokens[:-1], "differ at place"),
        (lambda s: s.opening(PROMPT.messages), "differ at place"),
        (lambda s: [*s.tokens, 10**6], "1000000 is no token of the vocabulary, which has 259"),
        (lambda s: [*s.tokens, -1], "-1 is no token"),
        (lambda s: [*s.tokens, 0.5], "whole numbers"),
        (lambda s: "text", "whole numbers"),
    ],
)
async def test_a_sequence_that_is_another_one_is_refused(second: Any, reason: str):
    async def wrong(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages))
        await session.generate(second(session))

    engine = FakeEngine([[*ids("41"), END]])
    trajectory = await rolled(engine, wrong)
    assert trajectory.status is Status.FAILED
    assert "rollout test_a_sequence_that_is_another_one_is_refused.<locals>.wrong: reply in turn 1 raised" in (trajectory.error or "")
    assert re.search(reason, trajectory.error or "")
    assert len(engine.requests) == 1


async def test_a_refusal_changes_nothing():
    async def tries(session: TokenSession, prompt: Prompt) -> dict[str, Any]:
        with pytest.raises(SessionRefused, match="no tokens to go on from"):
            await session.generate([])
        with pytest.raises(SessionRefused, match="max_new_tokens is 0"):
            await session.generate([1], max_new_tokens=0)
        with pytest.raises(SessionRefused, match="give a list of texts"):
            await session.generate([1], stop="!")
        with pytest.raises(SessionRefused, match="no part of a sequence of 0"):
            session.exclude(0, 1)
        return {"text": (await session.generate(session.opening(prompt.messages))).text}

    assert (await rolled(FakeEngine([[*ids("42"), END]]), tries)).info == {"text": "42"}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"stop": [13]}, "stop holds 13: give texts that are not empty and can be written in UTF-8"),
        ({"stop": ["!", None]}, "stop holds None"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": ["\ud83d"]}, r"stop holds '\\ud83d'"),
        ({"stop": b"!"}, "stop holds 33"),
        ({"stop": 5}, "stop is 5: give a list of texts"),
        ({"stop": "!"}, "stop is '!': give a list of texts"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: give a whole number"),
        ({"max_new_tokens": "2"}, "max_new_tokens is '2': give a whole number"),
        ({"max_new_tokens": np.int64(0)}, "max_new_tokens is 0: ask for one token at least"),
    ],
)
async def test_limits_and_stops_that_no_engine_takes_are_refused_and_change_nothing(asked: dict[str, Any], reason: str):
    async def tries(session: TokenSession, prompt: Prompt) -> dict[str, Any]:
        tokens = session.opening(prompt.messages)
        with pytest.raises(SessionRefused, match=reason):
            await session.generate(tokens, **asked)
        assert (session.tokens, session.turns_left) == ([], 3)
        return {"text": (await session.generate(tokens)).text}

    engine = FakeEngine([[*ids("42"), END]])
    trajectory = await rolled(engine, tries)
    assert (trajectory.error, trajectory.info) == (None, {"text": "42"})
    assert len(engine.requests) == 1


async def test_a_limit_may_be_a_number_of_numpy_and_reaches_the_engine_as_a_plain_one():
    limit: Any = np.int64(2)

    async def one(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages), max_new_tokens=limit, stop=[np.str_("!")])

    engine = FakeEngine([ids("forty-two")])
    assert (await rolled(engine, one)).generated_tokens == 2
    sampling = engine.requests[0].sampling
    assert (type(sampling.max_new_tokens), [type(text) for text in sampling.stop]) == (int, [str])


async def test_excluded_tokens_count_as_given():
    async def drafts(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages))
        session.exclude(*session.generated[0])
        await session.generate([*session.tokens, *session.continuation([Message("user", "more")])])

    engine = FakeEngine([[*ids("41"), END], [*ids("42"), END]])
    trajectory = await rolled(engine, drafts)
    assert trajectory.status is Status.FINISHED
    assert TOKENIZER.decode(trajectory.tokens_T[trajectory.loss_mask_T]) == "42<|im_end|>"
    assert (trajectory.versions_T != NO_VERSION).tolist() == trajectory.loss_mask_T.tolist()
    assert not trajectory.logprobs_T[~trajectory.loss_mask_T].any()
    between = ids("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
    assert engine.requests[1].tokens_T.tolist() == [*OPENING, *ids("41"), END, *between]

    async def nothing(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages))
        session.exclude(0, len(session.tokens))

    failed = await rolled(FakeEngine([[*ids("41"), END]]), nothing)
    assert (failed.status, "left to train" in (failed.error or "")) == (Status.FAILED, True)


async def test_a_function_that_raises_is_silent_or_returns_no_mapping_fails_its_own_trajectory():
    async def raises(session: TokenSession, prompt: Prompt) -> None:
        raise LookupError("no such room")

    async def silent(session: TokenSession, prompt: Prompt) -> None: ...

    async def text(session: TokenSession, prompt: Prompt) -> Any:
        await session.generate(session.opening(prompt.messages))
        return "done"

    async def objects(session: TokenSession, prompt: Prompt) -> Any:
        await session.generate(session.opening(prompt.messages))
        return {"a": object()}

    for function, reason in ((raises, "no such room"), (silent, "ended without asking"), (text, "'done' of type str"), (objects, "JSON")):
        trajectory = await rolled(FakeEngine([[END]]), function)
        assert trajectory.status is Status.FAILED
        assert reason in (trajectory.error or "")


async def test_an_engines_failure_is_not_the_functions_to_catch():
    async def careless(session: TokenSession, prompt: Prompt) -> None:
        try:
            await session.generate(session.opening(prompt.messages))
        except Exception:  # noqa: BLE001 - what many people's code does
            return

    with pytest.raises(EngineFailure, match="told to fail"):
        await rolled(FakeEngine([[1, 2]], fail_at=0), careless)


async def test_limits_of_turns_tokens_and_time():
    async def endless(session: TokenSession, prompt: Prompt) -> None:
        tokens: Sequence[int] = session.opening(prompt.messages)
        while True:
            await session.generate(tokens)
            tokens = [*session.tokens, *session.encode("more")]

    many = await rolled(FakeEngine([[*ids("41"), END]]), endless, max_turns=2)
    assert (many.status, len(many.turns), bool(many.loss_mask_T[-1])) == (Status.TRUNCATED, 2, True)
    long = await rolled(FakeEngine([[*ids("41"), END]]), endless, max_turns=9, max_model_tokens=len(OPENING) + 10)
    assert (long.status, len(long.tokens_T)) == (Status.TRUNCATED, len(OPENING) + 10)

    async def slow(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages))
        await asyncio.sleep(60)

    late = await rolled(FakeEngine([[END]]), slow, environment_deadline_s=0.05)
    assert "took longer than 0.05 s" in (late.error or "")


async def test_a_last_generation_at_its_limit_truncates():
    async def one(session: TokenSession, prompt: Prompt) -> None:
        await session.generate(session.opening(prompt.messages), max_new_tokens=2)

    assert (await rolled(FakeEngine([ids("long")]), one)).status is Status.TRUNCATED


async def test_another_replica_goes_on_from_what_is_known():
    calls = []

    async def noted(session: TokenSession, prompt: Prompt) -> dict[str, Any]:
        calls.append(prompt.id)
        return await budget(session, prompt)

    first = FakeEngine([ids("hm"), [*ids("42"), END]], tick_s=0.001)
    recorded = Recorded(first)
    whole = roller(first, Rollouts(noted), max_turns=3)
    rolling = asyncio.create_task(whole.roll(3, PROMPT, recorded=recorded))
    await first.generated(3)  # in the second turn
    known = recorded.all({g.id: g for g in await first.in_flight()})
    rolling.cancel()
    second = FakeEngine([[*ids("2"), END]])
    (trajectory,) = (await roller(second, Rollouts(noted), max_turns=3).roll(3, PROMPT, recorded=Recorded(second, known))).trajectories
    assert trajectory.info["thought"] == "hm"
    assert trajectory.info["answer"] == "42"
    assert [request.id for request in second.requests] == ["3/0/1+1"]  # the open turn's rest, and nothing else
    assert calls == [PROMPT.id] * 2
    assert np.array_equal(trajectory.logprobs_T[-3:], np.asarray([FakeEngine.logprob(t) for t in trajectory.tokens_T[-3:]], np.float32))


@pytest.mark.parametrize("again", [{"max_new_tokens": 2}, {"stop": ["r"]}, {"max_new_tokens": 5}])
async def test_what_is_known_of_another_limit_or_stop_is_not_used(again: dict[str, Any]):
    """It would be longer than was asked for, or shorter, or go on behind the stop: no engine's fault."""
    asked: dict[str, Any] = {"max_new_tokens": 3}

    async def otherwise(session: TokenSession, prompt: Prompt) -> dict[str, Any]:
        first = await session.generate(session.opening(prompt.messages), **asked)
        return {"first": first.text, "second": (await session.generate([*session.tokens, *ids("!")])).text}

    recorded = Recorded(FakeEngine([ids("forty-two")]))
    before = await roller(recorded._engine, Rollouts(otherwise), max_turns=3).roll(3, PROMPT, recorded=recorded)
    assert before.trajectories[0].info["first"] == "for"
    known = recorded.all({})
    for again_asked, first, requests in ((asked, "for", 0), (again, "forty-two"[: again.get("max_new_tokens", 9)], 2)):
        asked, engine = again_asked, FakeEngine([ids("forty-two")])
        rolled_again = await roller(engine, Rollouts(otherwise), max_turns=3).roll(3, PROMPT, recorded=Recorded(engine, known))
        (trajectory,) = rolled_again.trajectories
        assert (trajectory.error, trajectory.info["first"], len(engine.requests)) == (None, first, requests)


async def test_a_template_that_cannot_be_continued_is_no_hindrance():
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    renderer = ChatRenderer(tiny_tokenizer(template))
    fitting = replace(roller(FakeEngine([ids("hm"), [END]]), Rollouts(budget)), max_turns=2, renderer=renderer)
    assert (await fitting.roll(0, PROMPT)).trajectories[0].status is Status.FINISHED


def plain(session: TokenSession, prompt: Prompt) -> None: ...


async def wrong(session: TokenSession) -> None: ...


def test_a_reference_with_the_prefix_names_a_rollout():
    made = environment_factory("rollout:tests.unit.test_rollouts:budget", {"thought": 2})
    assert isinstance(made, Rollouts)
    assert made.function is budget
    assert environment_factory(made, {}) is made
    with pytest.raises(ExtensionError, match=r"rollout wrong\(session.*cannot be called as wrong\(session, prompt\)"):
        environment_factory("rollout:tests.unit.test_rollouts:wrong", {})
    with pytest.raises(ExtensionError, match=r"plain is no `async def`.*expected: async def rollout\(session, prompt, \*\*options\)"):
        environment_factory("rollout:tests.unit.test_rollouts:plain", {})
    with pytest.raises(ExtensionError, match="cannot be called as"):
        environment_factory("rollout:tests.unit.test_rollouts:budget", {"depth": 2})


# ---- the contract that anyone runs on their own


async def test_the_example_keeps_the_contract():
    file = Path(__file__).parents[2] / "examples/rollouts/budget.py"
    assert len(file.read_text().splitlines()) <= 30
    think = runpy.run_path(str(file))["think"]
    texts = ["a thought without end", "42"]
    (trajectory,) = await check_rollout(think, [PROMPT], texts, tokenizer=TOKENIZER, max_turns=2, thought=9)
    assert TOKENIZER.decode(trajectory.tokens_T[len(OPENING) :]) == "a thought\nThe answer: 42<|im_end|>"
    assert trajectory.info == {"cut": True}
    (short,) = await check_rollout(think, [PROMPT], ["42"], tokenizer=TOKENIZER, max_turns=2)
    assert (short.completion, short.info) == ("42", {"cut": False})


async def counts(session: TokenSession, prompt: Prompt, seen: list[int]) -> None:
    seen.append(1)
    await session.generate([*session.opening(prompt.messages), *session.encode(str(len(seen)))])


async def forgets(session: TokenSession, prompt: Prompt, seen: list[int]) -> dict[str, int]:
    await session.generate(session.opening(prompt.messages))
    seen.append(1)
    return {"seen": len(seen)}


async def needs_an_end(session: TokenSession, prompt: Prompt, seen: list[int]) -> None:
    if (await session.generate(session.opening(prompt.messages))).finish is FinishReason.LENGTH:
        raise ValueError("not whole")


async def stays(session: TokenSession, prompt: Prompt, seen: list[int]) -> None:
    try:
        await session.generate(session.opening(prompt.messages))
    except asyncio.CancelledError:
        await asyncio.sleep(0.6)


async def retokenises(session: TokenSession, prompt: Prompt, seen: list[int]) -> None:
    await session.generate(session.opening(prompt.messages))
    await session.generate(session.encode("another one"))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (counts, "expected two trajectories of one prompt, at the same time and with the same completions, to have the same tokens"),
        (forgets, "to have the same info, but they have {'seen': 1} and {'seen': 2}"),
        (needs_an_end, "also where a completion is cut after one token; .*not whole"),
        (stays, "let asyncio.CancelledError pass"),
        (retokenises, "expected a trajectory of p:0; .*differ at place"),
    ],
)
async def test_a_breach_of_the_contract_is_told(function: Any, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollouts_contract, "_LAST_S", 0.2)
    with pytest.raises(AssertionError, match=expected):
        await check_rollout(function, [PROMPT], ["42"], tokenizer=TOKENIZER, seen=[])
    await asyncio.sleep(1 if function is stays else 0)  # until what did not end has ended


async def test_the_contract_asks_for_prompts_texts_and_a_signature():
    with pytest.raises(AssertionError, match="at least one prompt"):
        await check_rollout(budget, [], ["a"], tokenizer=TOKENIZER)
    with pytest.raises(AssertionError, match="at least one text"):
        await check_rollout(budget, [PROMPT], [], tokenizer=TOKENIZER)
    with pytest.raises(ExtensionError, match="expected: async def rollout"):
        await check_rollout(plain, [PROMPT], ["a"], tokenizer=TOKENIZER)
