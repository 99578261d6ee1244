"""Agents that ask for completions: their sessions, the endpoint, and what becomes of those that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from typing import Any

import cloudpickle
import httpx
import openai
import pytest

from tests.unit.test_roll import END, ids, roller
from verst.data.call_forms import JSON
from verst.errors import DataError, EngineFailure, ExtensionError
from verst.fields import PerToken
from verst.rollout.agent import Agents
from verst.rollout.endpoint import LARGEST_REQUEST
from verst.rollout.environments import environment_factory
from verst.rollout.sessions import Said, Session, SessionRefused
from verst.rollout.user_loop import Caller, UserLoop
from verst.testing import FakeEngine
from verst.types import Completion, FinishReason, Message, Prompt, Sampling, Status, Trajectory

PROMPT = Prompt("p", (Message("user", "2 + 2?"),), {"answer": "4"})
RULES: Any = {"role": "system", "content": "Rules"}
ASK: Any = {"role": "user", "content": "2 + 2?"}
LONG = "x" * 500
"""An answer that its limit of tokens cuts."""
LIMITS: Any = {"sampling": Sampling(max_new_tokens=300), "max_prompt_tokens": 1000, "max_model_tokens": 4000, "max_turns": 4}


def saying(*texts: str) -> FakeEngine:
    """An engine that says these texts."""
    return FakeEngine([[*ids(text), END] for text in texts])


async def rolled(agent: Any, *texts: str, engine: FakeEngine | None = None, options: Any = None, **changes: Any) -> Trajectory:
    """The trajectory of an agent whose policy says these texts, in the order in which it is asked."""
    agents = Agents(agent, **(options or {}))
    try:
        (trajectory,) = (await roller(engine or saying(*texts), agents, **(LIMITS | changes)).roll(0, PROMPT)).trajectories
    finally:
        await agents.close()
    return trajectory


def contents(trajectory: Trajectory) -> list[str]:
    return [message.content for message in trajectory.messages]


def client(session: Session, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0, **options)


async def test_an_agent_that_knows_base_url_and_key_makes_a_trajectory():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            messages: list[Any] = [RULES, {"role": "user", "content": prompt.messages[0].content}]
            first = await api.chat.completions.create(model="any", messages=messages, temperature=0.3)
            messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Sure?"}]
            second = await api.chat.completions.create(model="any", messages=messages)
        return {"changed": first.choices[0].message.content != second.choices[0].message.content, "why": second.choices[0].finish_reason}

    trajectory = await rolled(solve, "5 ", LONG)
    assert [(m.role, m.content) for m in trajectory.messages] == [
        ("system", "Rules"),
        ("user", "2 + 2?"),
        ("assistant", "5 "),
        ("user", "Sure?"),
        ("assistant", "x" * 300),
    ]
    assert trajectory.info == {"changed": True, "why": "length", "not_heeded": ["temperature"]}
    assert (trajectory.status, trajectory.error, trajectory.branches) == (Status.TRUNCATED, None, ())


async def test_fields_that_an_agent_returns_are_those_of_its_trajectory():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        await session.complete([ASK])
        return {"tries": 1, "each": PerToken([0.5, 1])}

    trajectory = await rolled(solve, "4")
    assert (trajectory.info, trajectory.fields) == ({"tries": 1}, {"each": PerToken([0.5, 1])})
    short = await rolled(solve, "42")
    assert "field 'each'" in str(short.error)
    assert "with 2 values, not 3" in str(short.error)


async def test_a_plain_function_with_a_plain_client():
    def solve(session: Session, prompt: Prompt, *, times: int) -> None:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            assert [model.id for model in api.models.list()] == ["policy"]
            messages: list[Any] = [ASK]
            for _ in range(times):
                chunks = list(api.chat.completions.create(model="policy", messages=messages, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert chunks[-1].choices[0].finish_reason == "stop"
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]

    trajectory = await rolled(solve, "four", "4", options={"times": 2})
    assert (contents(trajectory), trajectory.info) == (["2 + 2?", "four", "Again.", "4"], {})
    assert trajectory.status is Status.FINISHED


async def test_answers_tell_of_their_tokens_as_openais():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            first = await api.chat.completions.create(model="m", messages=[ASK])
            assert first.usage is not None
            messages: Any = [ASK, first.choices[0].message, {"role": "user", "content": "Again."}]
            two = await api.chat.completions.create(model="m", messages=messages, n=2)
            assert two.usage is not None
            told = [[u.prompt_tokens, u.completion_tokens, u.total_tokens] for u in (first.usage, two.usage)]
            streamed: list[dict[str, Any]] = [{"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": False}}, {}]
            for options in streamed:
                stream: Any = await api.chat.completions.create(model="m", messages=messages, stream=True, **options)
                *chunks, last = [chunk async for chunk in stream]
                assert all(chunk.choices and chunk.usage is None for chunk in chunks)
                if options.get("stream_options") == {"include_usage": True}:
                    assert last.choices == []
                    told.append([last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens])
                else:
                    assert (last.usage, last.choices[0].finish_reason) == (None, "stop")
            with pytest.raises(openai.BadRequestError, match="stream_options must be an object"):
                await api.chat.completions.create(model="m", messages=messages, stream=True, extra_body={"stream_options": "usage"})
        return {"told": told}

    trajectory = await rolled(solve, "four", "4", "42", "4", "4", "4", max_turns=6)
    asked = len(ids("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"))
    again = asked + 5 + len(ids("\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"))
    assert trajectory.error is None
    assert trajectory.info == {"told": [[asked, 5, asked + 5], [again, 5, again + 5], [again, 2, again + 2]]}


async def test_an_agent_may_ask_without_http():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        return {"text": (await session.complete(prompt.messages)).text}

    assert (await rolled(solve, "4")).info == {"text": "4"}


@pytest.mark.parametrize("second", [[ASK, {"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "4"}]])
async def test_a_call_with_nothing_to_answer_is_refused(second: list[Any]):
    async def solve(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            await api.chat.completions.create(model="m", messages=[ASK])
            await api.chat.completions.create(model="m", messages=second)

    trajectory = await rolled(solve, "4")
    assert trajectory.status is Status.FAILED
    assert "nothing new to answer" in str(trajectory.error)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "JSON object with a list of messages"),
        (b'{"messages": []}', "JSON object with a list of messages"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has no text"),
        (b'{"messages": ["hi"]}', "message 0 must be an object"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "parts that are no text"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 0.5}', "n must be a whole number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', "tool 0 must be of the type function"),
        (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}', "text only"),
        (b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}', "message 0 has tool_calls"),
        (b"\xff\xfe", "codec"),
        (b'{"messages": ' + b"[" * 100_000, "recursion"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', "half of a surrogate pair"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "a\\udc00"}}]}',
            "half of a surrogate pair",
        ),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why_and_changes_nothing(body: bytes, reason: str):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with httpx.AsyncClient() as http:
            headers = {"Authorization": f"Bearer {session.api_key}"}
            refused = await http.post(f"{session.base_url}/chat/completions", content=body, headers=headers)
        await session.complete([ASK])
        return {"status": refused.status_code, "message": refused.json()["error"]["message"]}

    trajectory = await rolled(solve, "4")
    assert trajectory.info["status"] == 400
    assert reason in trajectory.info["message"]
    assert contents(trajectory) == ["2 + 2?", "4"]


async def test_keys_are_good_for_one_trajectory_until_it_ends():
    sessions: list[Session] = []

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        sessions.append(session)
        found = [await status("guessed"), await status(session.api_key, "Basic"), await status(session.api_key)]
        await session.complete([ASK])
        return {"statuses": found}

    async def status(key: str, scheme: str = "Bearer") -> int:
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{sessions[0].base_url}/chat/completions", json={}, headers={"Authorization": f"{scheme} {key}"})
        return answer.status_code

    agents = Agents(solve)
    (trajectory,) = (await roller(saying("4"), agents, **LIMITS).roll(0, PROMPT)).trajectories
    assert trajectory.info == {"statuses": [401, 401, 400]}  # a key that is known, though its body is no request
    assert len(sessions[0].api_key) >= 32
    assert await status(sessions[0].api_key) == 410
    await agents.close()
    with pytest.raises(SessionRefused, match="has ended"):
        await sessions[0].complete([ASK])


async def test_a_client_that_leaves_and_tries_again_gets_the_answer_that_was_generated():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session, timeout=0.2) as hasty:
            with pytest.raises(openai.APITimeoutError):
                await hasty.chat.completions.create(model="m", messages=[ASK])
        async with client(session) as api:  # as OpenAI's client does by itself
            header = {"x-stainless-retry-count": "1"}
            answer = await api.chat.completions.create(model="m", messages=[ASK], extra_headers=header)
        return {"text": answer.choices[0].message.content}

    engine = FakeEngine([[*ids("four"), END]], tick_s=0.1)
    trajectory = await rolled(solve, engine=engine)
    assert (trajectory.info, trajectory.branches) == ({"text": "four"}, ())
    assert len(engine.requests) == 1


async def test_an_agent_that_raises_asks_nothing_or_returns_no_mapping_fails_its_trajectory():
    async def raises(session: Session, prompt: Prompt) -> None:
        raise LookupError("no such room")

    async def silent(session: Session, prompt: Prompt) -> None: ...

    async def text(session: Session, prompt: Prompt) -> Any:
        await session.complete([ASK])
        return "done"

    async def objects(session: Session, prompt: Prompt) -> Any:
        await session.complete([ASK])
        return {"a": object()}

    async def cancelled(session: Session, prompt: Prompt) -> Any:
        await session.complete([ASK])
        raise asyncio.CancelledError

    for agent, reason in (
        (raises, "raises raised LookupError: no such room (" + __file__),
        (silent, "silent ended without asking for a completion"),
        (text, "returned 'done' of type str, not a mapping or None"),
        (objects, "info must hold JSON values"),
        (cancelled, "awaited something that was cancelled"),
    ):
        trajectory = await rolled(agent, "4")
        assert trajectory.status is Status.FAILED
        assert str(trajectory.error).startswith(f"agent {agent.__qualname__}")
        assert reason in str(trajectory.error)


async def test_an_engines_failure_is_not_the_agents_to_catch():
    async def careless(session: Session, prompt: Prompt) -> None:
        try:
            await session.complete([ASK])
        except Exception:  # noqa: BLE001 - what many people's code does
            return

    with pytest.raises(EngineFailure, match="told to fail"):
        await rolled(careless, engine=FakeEngine([[1, 2]], fail_at=0))


async def test_an_opening_that_is_too_long_is_the_datas_fault_or_the_agents():
    async def asks(session: Session, prompt: Prompt) -> None:
        await session.complete(prompt.messages)

    async def adds(session: Session, prompt: Prompt) -> None:
        await session.complete([RULES, *prompt.messages])

    with pytest.raises(DataError, match=r"prompt p .* has 25 tokens, above the limit of 20"):
        await rolled(asks, max_prompt_tokens=20)
    trajectory = await rolled(adds, max_prompt_tokens=30)
    assert trajectory.status is Status.FAILED
    assert "the opening, which is not the prompt's messages, has 40 tokens, where 1 to 30 can be" in str(trajectory.error)


async def test_the_end_of_a_trajectory_ends_an_agent_that_waits():
    ended = asyncio.Event()

    async def solve(session: Session, prompt: Prompt) -> None:
        try:
            await session.complete([ASK])
        finally:
            ended.set()

    engine = FakeEngine([[1] * 300], tick_s=0.05)
    rolling = asyncio.create_task(rolled(solve, engine=engine))
    await engine.generated(1)
    rolling.cancel()
    await asyncio.wait({rolling})
    assert rolling.cancelled()
    assert ended.is_set()
    assert not engine._running


async def test_a_thread_whose_trajectory_is_over_is_refused():
    refused: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def solve(session: Session, prompt: Prompt) -> None:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            try:
                api.chat.completions.create(model="m", messages=[ASK])
            except openai.APIStatusError as error:
                refused.append(str(error))
        loop.call_soon_threadsafe(done.set)

    agents = Agents(solve)
    engine = FakeEngine([[1] * 300], tick_s=0.05)
    rolling = asyncio.create_task(roller(engine, agents, **LIMITS).roll(0, PROMPT))
    await engine.generated(1)
    rolling.cancel()
    await asyncio.wait({rolling})
    await asyncio.wait_for(done.wait(), 5)
    await agents.close()
    assert "has ended" in refused[0]


def never(session: Session, prompt: Prompt) -> None: ...


def wrong(session: Session) -> None: ...


def test_a_reference_with_the_prefix_names_an_agent():
    made = environment_factory("agent:tests.unit.test_agent:never", {})
    assert isinstance(made, Agents)
    assert made.function is never
    assert environment_factory(made, {}) is made
    with pytest.raises(ExtensionError, match="agent never has its options already"):
        environment_factory(made, {"a": 1})
    with pytest.raises(ExtensionError, match=r"agent wrong\(session.*cannot be called as wrong\(session, prompt\)"):
        environment_factory("agent:tests.unit.test_agent:wrong", {})
    with pytest.raises(ExtensionError, match="has no 'nobody'"):
        environment_factory("agent:tests.unit.test_agent:nobody", {})
    assert pickle.loads(cloudpickle.dumps(made)).function is never


async def test_an_answer_that_was_cut_ends_its_agent_in_order():
    """It is told that the context is used up, as by other servers, and may still say what came of it."""

    async def solve(session: Session, prompt: Prompt, *, heeds: bool) -> dict[str, Any]:
        async with client(session) as api:
            messages: list[Any] = [ASK]
            first = await api.chat.completions.create(model="m", messages=messages, temperature=0)
            messages += [first.choices[0].message, ASK]
            with pytest.raises(openai.BadRequestError, match="this model's maximum context length is") as refused:
                await api.chat.completions.create(model="m", messages=messages)
            if not heeds:
                raise refused.value
        return {"first": str(first.choices[0].message.content)[:3]}

    for heeds, said_of_it in ((True, {"first": "xxx"}), (False, {})):
        trajectory = await rolled(solve, LONG, options={"heeds": heeds})
        assert (trajectory.status, trajectory.error) == (Status.TRUNCATED, None)
        assert trajectory.info == {**said_of_it, "not_heeded": ["temperature"]}


@pytest.mark.parametrize("pause_s", [0.01, 0])
async def test_an_agent_that_goes_on_after_its_answer_was_cut_is_ended(monkeypatch: pytest.MonkeyPatch, pause_s: float):
    monkeypatch.setattr("verst.rollout.conversations._ORDERLY_S", 0.1)

    async def stubborn(session: Session, prompt: Prompt) -> None:
        messages: list[Any] = [ASK]
        while True:
            with contextlib.suppress(SessionRefused):
                answer = await session.complete(messages)
                messages += [{"role": "assistant", "content": answer.text}, ASK]
            await asyncio.sleep(pause_s)

    trajectory = await asyncio.wait_for(rolled(stubborn, LONG), 5)
    assert (trajectory.status, trajectory.info, trajectory.error) == (Status.TRUNCATED, {}, None)


async def test_the_answers_of_a_trajectory_are_counted():
    async def endless(session: Session, prompt: Prompt) -> None:
        messages: list[Any] = [ASK]
        while True:
            answer = await session.complete(messages)
            messages += [{"role": "assistant", "content": answer.text}, ASK]

    trajectory = await rolled(endless, "4", max_turns=3)
    assert (trajectory.status, len(trajectory.turns), trajectory.error) == (Status.TRUNCATED, 3, None)
    assert trajectory.loss_mask_T[-1]  # nothing is given that no one answers


async def test_a_conversation_that_is_full_is_refused_its_next_call():
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        answer = await session.complete([ASK])
        messages: list[Any] = [ASK, {"role": "assistant", "content": answer.text}, {"role": "user", "content": LONG}]
        with pytest.raises(SessionRefused, match="maximum context length"):
            await session.complete(messages)
        return {"told": True}

    trajectory = await rolled(solve, "4", max_model_tokens=200)
    assert (trajectory.status, trajectory.info, len(trajectory.turns)) == (Status.TRUNCATED, {"told": True}, 1)


async def hand_over(agent: Any, *texts: str) -> list[tuple[Said, ...]]:
    """What an agent adds to its conversation with each call, where a hand answers them."""
    agents = Agents(agent)
    session = await agents.open()
    users = UserLoop()
    running, heard = agents.begin(session, PROMPT, users, Caller(agents.title)), list[tuple[Said, ...]]()
    for turn, text in enumerate(texts):
        call = await session.asked()
        heard.append(call.new)
        session.answer(call, turn, Completion(text, (1, 2), FinishReason.STOP), 1, JSON)
    await running
    agents.forget(session)
    await agents.close()
    users.close()
    return heard


async def test_a_client_that_leaves_in_the_middle_of_a_stream_fails_nobody_elses_trajectory():
    long = "x" * 2_000_000

    async def leaves(session: Session, prompt: Prompt) -> None:
        api = client(session)
        stream = await api.chat.completions.create(model="m", messages=[ASK], stream=True)
        await anext(stream)
        await api.close()  # with most of the answer unread
        async with client(session) as other:
            messages: list[Any] = [ASK, {"role": "assistant", "content": long}, ASK]
            again = await other.chat.completions.create(model="m", messages=messages)
        assert again.choices[0].message.content == "4"

    asked = Said("user", "2 + 2?")
    assert await hand_over(leaves, long, "4") == [(asked,), (asked,)]


async def test_a_client_that_leaves_for_good_ends_its_trajectory():
    async def leaves(session: Session, prompt: Prompt) -> None:
        async with client(session, timeout=0.1) as hasty:
            await hasty.chat.completions.create(model="m", messages=[ASK])

    trajectory = await asyncio.wait_for(rolled(leaves, engine=FakeEngine([[1]], stall_at=0)), 5)
    assert "raised openai.APITimeoutError" in str(trajectory.error)


async def test_an_agent_that_never_asks_again_has_its_deadline():
    async def hangs(session: Session, prompt: Prompt) -> None:
        await session.complete([ASK])
        await asyncio.Event().wait()

    engine = FakeEngine([[*ids("four"), END]], tick_s=0.1)  # whose time is not the agent's
    trajectory = await rolled(hangs, engine=engine, environment_deadline_s=0.3)
    assert "hangs took longer than 0.3 s to ask again or to end" in str(trajectory.error)
    assert trajectory.completion == "four"


async def test_a_trajectory_that_its_deadline_finds_unfinished_says_that_its_agent_thinks():
    async def thinks(session: Session, prompt: Prompt) -> None:
        await session.complete([ASK])
        await asyncio.Event().wait()

    agents = Agents(thinks)
    (trajectory,) = (await roller(saying("4"), agents, **LIMITS).roll(0, PROMPT, deadline_s=0.3)).trajectories
    await agents.close()
    assert trajectory.status is Status.FAILED
    assert f"not finished after 0.3 s, waiting for agent {thinks.__qualname__} to ask" in str(trajectory.error)
    assert trajectory.completion == "4"


async def test_one_that_heeds_no_cancellation_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.rollout.conversations.CLOSE_DEADLINE_S", 0.1)
    freed = asyncio.Event()

    async def clings(session: Session, prompt: Prompt) -> None:
        await session.complete([ASK])
        while not freed.is_set():
            with contextlib.suppress(asyncio.CancelledError, SessionRefused):
                await session.complete([ASK])
            with contextlib.suppress(asyncio.CancelledError):
                await freed.wait()

    trajectory = await rolled(clings, "4", max_turns=1)
    freed.set()
    assert trajectory.status is Status.FAILED
    assert "clings did not end within 0.1 s of being cancelled" in str(trajectory.error)


async def test_a_request_that_is_too_large_says_so():
    async def solve(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            messages: list[Any] = [{"role": "user", "content": "x" * (LARGEST_REQUEST + 1)}]
            await api.chat.completions.create(model="m", messages=messages)

    trajectory = await rolled(solve)
    assert "413" in str(trajectory.error)
    assert "at most 16777216 bytes: cut what tools have printed" in str(trajectory.error)
