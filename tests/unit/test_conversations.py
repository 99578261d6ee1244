"""Agents whose conversations branch: which tokens are shared, which are trained, and what ends what."""

from __future__ import annotations

import asyncio
import contextlib
import re
import runpy
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_agent import ASK, LIMITS, LONG, PROMPT, RULES, client, contents, rolled, saying
from tests.unit.test_roll import END, TOKENIZER, ids, roller
from verst.data.chat import ChatRenderer
from verst.fields import PerToken
from verst.rollout.agent import Agents
from verst.rollout.recorded import Recorded
from verst.rollout.sessions import Session, SessionRefused
from verst.testing import CHATML, FakeEngine, tiny_tokenizer
from verst.types import NO_VERSION, Branch, GenerateRequest, Prompt, RoutedExperts, Status, Trajectory

EXAMPLE = Path(__file__).parents[2] / "examples/agents/sub_agents.py"
MANY: Any = {"max_turns": 40}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def own_id(request: GenerateRequest) -> list[int]:
    """An answer that no other request has: its id."""
    return [*ids(request.id), END]


def naming(**options: Any) -> FakeEngine:
    return FakeEngine(own_id, **options)


async def extended(session: Session, messages: Sequence[Any], *, again: bool = False) -> list[Any]:
    """The messages with the policy's answer."""
    return [*messages, {"role": "assistant", "content": (await session.complete(messages, again=again)).text}]


def require_exact(trajectory: Trajectory, engine: FakeEngine) -> None:
    """Every sequence is what the engine was asked and returned, as the template writes it; every token that it returned is trained once."""
    requests = {request.id: request for request in engine.requests}
    trained: list[str] = []
    began: list[int] = []
    for one in trajectory.sequences:
        text = TOKENIZER.apply_chat_template([{"role": m.role, "content": m.content} for m in one.messages], tokenize=False)
        assert TOKENIZER.decode(one.tokens_T) == text.removesuffix("\n")
        answered = np.zeros(len(one.tokens_T), np.bool_)
        for turn in one.turns:
            request = requests[turn.text]
            assert one.tokens_T[: turn.generated].tolist() == request.tokens_T.tolist()
            assert one.tokens_T[turn.generated : turn.end].tolist() == own_id(request)
            masks = set(one.loss_mask_T[turn.generated : turn.end].tolist())
            assert len(masks) == 1
            trained += [turn.text] if masks == {True} else []
            answered[turn.generated : turn.end] = True
        assert not one.loss_mask_T[~answered].any()
        mask = one.loss_mask_T.tolist()
        assert one.logprobs_T.tolist() == [FakeEngine.logprob(t) if m else 0 for t, m in zip(one.tokens_T, mask, strict=True)]
        assert one.versions_T.tolist() == [0 if m else NO_VERSION for m in mask]
        assert any(mask)
        began.append(min(number for number, turn in zip(turns(one), one.turns, strict=True) if mask[turn.generated]))
    assert began[1:] == sorted(began[1:])
    assert sorted(trained) == sorted(requests)


def require_routes(trajectory: Trajectory, engine: FakeEngine, kind: RoutedExperts) -> None:
    """Each pass has the routes of the request that made it, also where another conversation shares its tokens."""
    numbers = {request.id: number for number, request in enumerate(engine.requests)}
    for one in trajectory.sequences:
        assert one.routes is not None
        ends = [0, *(turn.end - 1 for turn in one.turns)]
        expected = [
            FakeEngine.experts(place, numbers[turn.text], kind)
            for turn, first, end in zip(one.turns, ends, ends[1:], strict=False)
            for place in range(first, end)
        ]
        np.testing.assert_array_equal(one.routes.experts_TLK, expected)


def turns(one: Trajectory | Branch) -> list[int]:
    """The numbers of a sequence's turns, where answers are the ids of their requests."""
    return [int(turn.text.rpartition("/")[2]) for turn in one.turns]


async def test_a_sub_agent_between_two_answers_is_a_branch():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        main = await extended(session, [RULES, ASK])
        sub = await extended(session, [user("Help.")])
        sub = await extended(session, [*sub, user("More.")])
        await extended(session, [*main, user(sub[-1]["content"])])
        return {"helped": True}

    engine = naming()
    trajectory = await rolled(solve, engine=engine)
    require_exact(trajectory, engine)
    assert [turns(one) for one in trajectory.sequences] == [[0, 3], [1, 2]]
    assert contents(trajectory) == ["Rules", "2 + 2?", "0/0/0", "0/0/2", "0/0/3"]
    assert (trajectory.status, trajectory.completion, trajectory.info) == (Status.FINISHED, "0/0/3", {"helped": True})
    assert trajectory.generated_tokens == 4 * len([*ids("0/0/0"), END])


async def test_what_follows_an_answer_that_was_cut_may_be_a_summary():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        first = await extended(session, [ASK])
        with pytest.raises(SessionRefused, match="maximum context length"):
            await session.complete([*first, user("Go on.")])
        last = await extended(session, [user("So far: xxx. " + ASK["content"])])
        return {"answer": last[-1]["content"]}

    trajectory = await rolled(solve, LONG, "4")
    (branch,) = trajectory.branches
    assert (trajectory.status, trajectory.info, trajectory.completion) == (Status.TRUNCATED, {"answer": "4"}, "4")
    assert branch.turns[0].text == "x" * 300
    assert branch.loss_mask_T.sum() == 300


async def test_an_agent_that_raises_after_it_has_found_room_has_failed():
    async def solve(session: Session, prompt: Prompt) -> None:
        first = await extended(session, [ASK])
        with pytest.raises(SessionRefused):
            await session.complete([*first, user("Go on.")])
        await extended(session, [user("Shorter.")])
        raise LookupError("no such room")

    trajectory = await rolled(solve, LONG, "4")
    assert trajectory.status is Status.FAILED
    assert "no such room" in str(trajectory.error)


async def test_an_edited_history_shares_what_stands_before_the_edit():
    async def solve(session: Session, prompt: Prompt) -> None:
        one = await extended(session, [ASK])
        two = await extended(session, [*one, user("Sure?")])
        three = await extended(session, [*one, user("Really?")])
        edited = [*three[:-1], {"role": "assistant", "content": "edited"}, user("And?")]
        assert len(two) == len(three)
        await extended(session, edited)

    engine = naming()
    trajectory = await rolled(solve, engine=engine)
    require_exact(trajectory, engine)
    assert [turns(one) for one in trajectory.sequences] == [[0, 3], [0, 1], [0, 2]]
    assert contents(trajectory) == ["2 + 2?", "0/0/0", "Really?", "edited", "And?", "0/0/3"]
    first = trajectory.turns[0]
    assert not trajectory.loss_mask_T[: first.end].any()  # trained in the branch where they were sampled
    assert trajectory.branches[0].loss_mask_T[first.generated : first.end].all()
    assert not trajectory.branches[1].loss_mask_T[: first.end].any()


async def test_several_answers_are_asked_of_one_prefix_and_one_goes_on():
    async def solve(session: Session, prompt: Prompt) -> None:
        main = await extended(session, [ASK])
        found = await asyncio.gather(*(extended(session, [*main, user("Sure?")]) for _ in range(3)))
        await extended(session, [*found[1], user("So?")])

    engine = naming()
    trajectory = await rolled(solve, engine=engine, **MANY)
    require_exact(trajectory, engine)
    assert [turns(one) for one in trajectory.sequences] == [[0, 2, 4], [0, 1], [0, 3]]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_are_as_many_conversations(stream: bool):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            reply: Any = await api.chat.completions.create(model="policy", messages=[ASK], n=3, stream=stream)
            if stream:
                deltas = [chunk.choices[0] async for chunk in reply]
                return {"said": [choice.delta.content for choice in deltas if choice.finish_reason is None]}
        return {"said": [choice.message.content for choice in reply.choices]}

    engine = naming()
    trajectory = await rolled(solve, engine=engine)
    require_exact(trajectory, engine)
    assert trajectory.info == {"said": ["0/0/0", "0/0/1", "0/0/2"]}
    assert [turns(one) for one in trajectory.sequences] == [[2], [0], [1]]


async def test_of_equal_answers_one_that_nothing_follows_goes_on():
    async def solve(session: Session, prompt: Prompt) -> None:
        first, second = await asyncio.gather(extended(session, [ASK]), extended(session, [ASK]))
        assert first == second
        await extended(session, [*first, user("Sure?")])
        await extended(session, [*first, user("Sure?")])

    trajectory = await rolled(solve, "4")
    assert [len(one.turns) for one in trajectory.sequences] == [2, 2]
    assert [int(one.loss_mask_T.sum()) for one in trajectory.sequences] == [4, 4]  # nothing is shared


async def test_sub_agents_ask_at_the_same_time_with_openais_client():
    async def help_with(api: openai.AsyncOpenAI, task: str) -> str:
        messages: list[Any] = [RULES, user(task)]
        for _ in range(2):
            reply = await api.chat.completions.create(model="policy", messages=messages)
            messages += [reply.choices[0].message, user("More.")]
        return str(messages[-2].content)

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            plan = (await api.chat.completions.create(model="policy", messages=[ASK])).choices[0].message
            found = await asyncio.gather(*(help_with(api, task) for task in "abc"))
            messages: list[Any] = [ASK, plan, user(" ".join(found))]
            last = await api.chat.completions.create(model="policy", messages=messages)
        return {"last": last.choices[0].message.content}

    engine = naming(tick_s=0.01)
    trajectory = await rolled(solve, engine=engine, **MANY)
    require_exact(trajectory, engine)
    assert trajectory.info == {"last": "0/0/7"}
    assert turns(trajectory) == [0, 7]
    assert [len(branch.turns) for branch in trajectory.branches] == [2, 2, 2]
    assert sorted(branch.messages[1].content for branch in trajectory.branches) == ["a", "b", "c"]
    assert [kind for kind, _ in engine.events][:5] == ["generate", "finish", *["generate"] * 3]


async def test_the_example():
    solve = runpy.run_path(str(EXAMPLE))["solve"]
    engine = naming(tick_s=0.001)
    trajectory = await rolled(solve, engine=engine)
    require_exact(trajectory, engine)
    assert (trajectory.status, trajectory.info) == (Status.FINISHED, {"agree": False})
    assert [turns(one) for one in trajectory.sequences] == [[0, 3], [1], [2]]
    helpers = [branch.messages[0].content for branch in trajectory.branches]
    assert sorted(helpers) == ["You are helper 1.\n0/0/0", "You are helper 2.\n0/0/0"]


async def test_a_client_that_repeats_a_call_is_given_its_answer_and_no_other():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        first, second = await asyncio.gather(extended(session, [ASK]), extended(session, [ASK]))
        again = [(await extended(session, [ASK], again=True))[-1]["content"] for _ in range(2)]
        while_asked = await asyncio.gather(extended(session, [RULES, ASK]), extended(session, [RULES, ASK], again=True))
        return {"first": [first[-1]["content"], second[-1]["content"]], "again": again, "while": [m[-1]["content"] for m in while_asked]}

    engine = naming(tick_s=0.001)
    info = (await rolled(solve, engine=engine)).info
    assert info == {"first": ["0/0/0", "0/0/1"], "again": ["0/0/0", "0/0/1"], "while": ["0/0/2", "0/0/2"]}
    assert len(engine.requests) == 3


async def test_a_call_that_cannot_be_rendered_fails_alone():
    template = CHATML.replace("{%", "{%- if messages[-1].role == 'odd' %}{{ raise_exception('an odd role') }}{%- endif %}{%", 1)

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        main = await extended(session, [ASK])
        refused = []
        for before in ([], main):
            with pytest.raises(SessionRefused, match=r"cannot be rendered.*an odd role") as error:
                await session.complete([*before, {"role": "odd", "content": "?"}])
            refused.append(str(error.value))
        await extended(session, [*main, user("Sure?")])
        return {"refused": len(refused)}

    made = roller(saying("4", "5"), agents := Agents(solve), **LIMITS)
    object.__setattr__(made, "renderer", ChatRenderer(tiny_tokenizer(template)))
    (trajectory,) = (await made.roll(0, PROMPT)).trajectories
    await agents.close()
    assert (trajectory.status, trajectory.error, trajectory.info) == (Status.FINISHED, None, {"refused": 2})
    assert contents(trajectory) == ["2 + 2?", "4", "Sure?", "5"]
    assert trajectory.branches == ()


async def test_an_opening_without_tokens_fails_alone():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        await extended(session, [ASK])
        with pytest.raises(SessionRefused, match="no tokens"):
            await session.complete([user("")])
        return {"done": True}

    made = roller(saying("4"), agents := Agents(solve), **LIMITS)
    object.__setattr__(made, "renderer", ChatRenderer(tiny_tokenizer(None)))
    (trajectory,) = (await made.roll(0, PROMPT)).trajectories
    await agents.close()
    assert (trajectory.status, trajectory.info) == (Status.FINISHED, {"done": True})


async def test_a_conversation_without_room_leaves_the_others_theirs():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        main = await extended(session, [ASK])
        for before in ([], main):
            with pytest.raises(SessionRefused, match="maximum context length"):
                await session.complete([*before, user(LONG)])
        await extended(session, [*main, user("Sure?")])
        return {"done": True}

    trajectory = await rolled(solve, "4", max_model_tokens=200)
    assert (trajectory.status, trajectory.info, trajectory.branches) == (Status.TRUNCATED, {"done": True}, ())
    assert len(trajectory.turns) == 2


async def test_an_agent_that_breaks_at_a_full_conversation_before_any_answer_has_failed():
    """There would be nothing to train, yet it would count in its group's baseline."""

    async def solve(session: Session, prompt: Prompt) -> None:
        await asyncio.gather(session.complete([ASK]), session.complete([user("z" * 1000)]))

    trajectory = await rolled(solve, engine=naming(tick_s=0.05), max_model_tokens=200)
    assert (trajectory.status, trajectory.turns) == (Status.FAILED, ())
    assert "ended before any of its calls was answered" in (trajectory.error or "")


@pytest.mark.parametrize(("works_s", "status"), [(0.5, Status.TRUNCATED), (10.0, Status.FAILED)])
async def test_an_answer_after_a_refusal_gives_its_agent_its_whole_time(works_s: float, status: Status, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.rollout.conversations._ORDERLY_S", 0.1)

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        under_way = asyncio.create_task(session.complete([ASK]))
        await asyncio.sleep(0.02)
        with pytest.raises(SessionRefused, match="maximum context length"):
            await session.complete([user("z" * 1000)])
        await under_way
        await asyncio.sleep(works_s)  # a tool
        return {"done": True}

    trajectory = await rolled(solve, engine=naming(tick_s=0.05), max_model_tokens=200, environment_deadline_s=4.0)
    assert (trajectory.status, trajectory.info) == (status, {"done": True} if status is Status.TRUNCATED else {})
    assert status is Status.TRUNCATED or "took longer than 4 s" in (trajectory.error or "")


async def refused(session: Session, messages: Sequence[Any], times: int) -> None:
    for _ in range(times):
        with contextlib.suppress(SessionRefused):
            await session.complete(messages)


async def test_calls_that_were_refused_are_not_kept_and_equal_messages_are_kept_once():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        first = await extended(session, [ASK])
        await refused(session, [*first, user("z" * 1000)], 900)
        await extended(session, [*(dict(message) for message in first), user("Sure?")])
        one, two = session._calls
        assert one.answer is not None
        return {"shared": [two.asked[0] is one.asked[0], two.asked[1] is one.answer.said], "asked": len(two.asked)}

    trajectory = await rolled(solve, "4", "5", max_model_tokens=200)
    assert (trajectory.error, trajectory.info) == (None, {"shared": [True, True], "asked": 3})


async def test_an_agent_that_is_refused_without_end_is_ended():
    async def full(session: Session, prompt: Prompt) -> None:
        under_way = asyncio.create_task(session.complete([ASK]))
        await asyncio.sleep(0.02)
        await refused(session, [user("z" * 1000)], 10**9)
        await under_way

    async def empty(session: Session, prompt: Prompt) -> None:
        await extended(session, [ASK])
        await refused(session, [user("")], 10**9)

    ended = await asyncio.wait_for(rolled(full, engine=naming(tick_s=0.05), max_model_tokens=200), 20)
    assert (ended.status, ended.error, len(ended.turns)) == (Status.TRUNCATED, None, 1)
    made = roller(saying("4"), agents := Agents(empty), **LIMITS)
    object.__setattr__(made, "renderer", ChatRenderer(tiny_tokenizer(None)))
    (failed,) = (await asyncio.wait_for(made.roll(0, PROMPT), 20)).trajectories
    await agents.close()
    assert failed.status is Status.FAILED
    assert re.search(r"agent .*empty: 1000 of its calls were refused, the last with: these messages have no tokens", failed.error or "")


async def test_what_is_still_asked_when_the_agent_ends_is_left_out():
    engine = FakeEngine(
        lambda request: [*ids("4" * 200), END] if "Help" in TOKENIZER.decode(request.tokens_T) else own_id(request), tick_s=0.01
    )

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        main = await extended(session, [ASK])
        asked = [asyncio.create_task(session.complete(messages)) for messages in ([user("Help.")], [*main, user("Help me.")])]
        await asyncio.sleep(0)  # they ask first
        await extended(session, [*main, user("Sure?")])
        return {"waiting": sum(not task.done() for task in asked)}

    trajectory = await rolled(solve, engine=engine)
    assert (trajectory.info, trajectory.status) == ({"waiting": 2}, Status.FINISHED)
    assert (contents(trajectory)[-1], turns(trajectory)) == ("0/0/3", [0, 3])
    (branch,) = trajectory.branches  # where the first answer was sampled, without the question that nobody answered
    assert [message.content for message in branch.messages] == ["2 + 2?", "0/0/0"]
    assert not engine._running


async def test_turns_are_counted_over_all_conversations():
    async def solve(session: Session, prompt: Prompt) -> None:
        await asyncio.gather(*(extended(session, [user(task)]) for task in "abcde"))

    engine = naming(tick_s=0.001)
    trajectory = await rolled(solve, engine=engine, max_turns=3)
    require_exact(trajectory, engine)
    assert (trajectory.status, trajectory.error) == (Status.TRUNCATED, None)
    assert sorted(turn for one in trajectory.sequences for turn in turns(one)) == [0, 1, 2]


async def test_an_agent_that_waits_for_one_of_its_calls_is_not_late():
    async def solve(session: Session, prompt: Prompt) -> None:
        slow = asyncio.create_task(extended(session, [user("slow")]))
        await extended(session, [user("fast")])
        await slow

    engine = FakeEngine(lambda request: [*ids("x" * (40 if "slow" in TOKENIZER.decode(request.tokens_T) else 1)), END], tick_s=0.02)
    trajectory = await rolled(solve, engine=engine, environment_deadline_s=0.3)
    assert (trajectory.status, trajectory.error) == (Status.FINISHED, None)
    assert trajectory.completion == "x" * 40  # the last to be answered


async def test_a_field_has_a_value_for_each_loss_token_of_all_sequences():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        one = await extended(session, [ASK])
        await extended(session, [user("Help.")])
        await extended(session, [*one, user("Sure?")])
        return {"each": PerToken(range(7))}

    trajectory = await rolled(solve, "4", "55", "6")
    assert [int(one.loss_mask_T.sum()) for one in trajectory.sequences] == [4, 3]
    assert trajectory.fields == {"each": PerToken(range(7))}


async def best_of(session: Session, prompt: Prompt) -> dict[str, Any]:
    """Three attempts at once, one of which goes on, and a summary."""
    found = await asyncio.gather(*(extended(session, [ASK]) for _ in range(3)))
    last = await extended(session, [*max(found, key=lambda messages: messages[-1]["content"]), user("Sure?")])
    await extended(session, [user(f"Sum up: {last[-1]['content']}")])
    return {"best": last[-1]["content"]}


def same(one: Trajectory, other: Trajectory) -> bool:
    if (one.status, one.info, len(one.sequences)) != (other.status, other.info, len(other.sequences)):
        return False
    names = ("tokens_T", "loss_mask_T", "logprobs_T", "versions_T")
    pairs = zip(one.sequences, other.sequences, strict=True)
    return all(a.turns == b.turns and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names) for a, b in pairs)


async def test_the_same_answers_make_the_same_trajectory():
    engines = [naming(), naming()]
    one, other = [await rolled(best_of, engine=engine, **MANY) for engine in engines]
    assert same(one, other)
    assert [turns(sequence) for sequence in one.sequences] == [[4], [0], [1], [2, 3]]
    seeds = [{request.id: request.seed for request in engine.requests} for engine in engines]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == 5


async def test_a_lost_replicas_answers_are_given_to_all_conversations():
    first, second = naming(tick_s=0.005), naming()
    agents = Agents(best_of)
    recorded = Recorded(first)
    rolling = asyncio.create_task(roller(first, agents, **(LIMITS | MANY)).roll(0, PROMPT, recorded=recorded))
    await first.generated(3 * len(own_id_of("0/0/0")) + 2)
    known = recorded.all({generation.id: generation for generation in await first.in_flight()})
    rolling.cancel()
    await asyncio.wait({rolling})
    assert sorted(piece.generation.id for piece in known) == ["0/0/0", "0/0/1", "0/0/2", "0/0/3"]
    rest = FakeEngine(lambda request: own_id_of(request.id.partition("+")[0])[2 if "+" in request.id else 0 :])
    again = Recorded(rest, known)
    (trajectory,) = (await roller(rest, agents, **(LIMITS | MANY)).roll(0, PROMPT, recorded=again)).trajectories
    await agents.close()
    assert same(trajectory, await rolled(best_of, engine=second, **MANY))
    assert [request.id for request in rest.requests] == ["0/0/3+1", "0/0/4"]


def own_id_of(name: str) -> list[int]:
    return [*ids(name), END]


async def test_agents_race():
    async def solve(session: Session, prompt: Prompt) -> None:
        await asyncio.gather(*(extended(session, [user(task)]) for task in "ab"))

    def answer(request: GenerateRequest) -> list[int]:
        return ids("x" * 250) if request.id.startswith("0/1/") else own_id(request)

    engine, agents = FakeEngine(answer, tick_s=0.005), Agents(solve)
    group = await roller(engine, agents, **(LIMITS | {"oversample": 1})).roll(0, PROMPT)
    await agents.close()
    (kept,) = group.trajectories
    assert (kept.id, kept.status, len(kept.branches)) == ("0/0", Status.FINISHED, 1)
    (cut,) = group.cut
    assert 0 < cut < 500  # tokens of both of its conversations
    assert not engine._running


Step = tuple[int, int, str, bool]
"""Of which known conversation, up to which of its answers (0: none), with which question, and whether its history is edited."""
STEPS = st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from("ab"), st.booleans())


def walks(batches: Sequence[Sequence[Step]]) -> Callable[[Session, Prompt], Awaitable[None]]:
    """An agent that asks the questions of each batch at once."""

    async def solve(session: Session, prompt: Prompt) -> None:
        known: list[list[Any]] = [[]]
        for batch in batches:
            known += await asyncio.gather(*(extended(session, asked(known, step)) for step in batch))

    return solve


def asked(known: Sequence[list[Any]], step: Step) -> list[Any]:
    which, answers, question, edits = step
    messages = known[which % len(known)][: 2 * answers]
    if edits and messages:
        messages = [*messages[:-1], {"role": "assistant", "content": "edited"}]
    return [*messages, user(question)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(STEPS, min_size=1, max_size=3), min_size=1, max_size=6))
def test_whatever_is_asked_each_token_is_trained_once_and_each_sequence_is_exact(batches: list[list[Step]]):
    kind = RoutedExperts(2, 8, 2)
    engine = naming(routed_experts=kind)
    trajectory = asyncio.run(rolled(walks(batches), engine=engine, **MANY))
    assert (trajectory.status, trajectory.error) == (Status.FINISHED, None)
    require_exact(trajectory, engine)
    require_routes(trajectory, engine, kind)
