"""Agents that ask for completions: their sessions, the endpoint, and what becomes of those that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import cloudpickle
import httpx
import openai
import pytest

from verst.errors import EnvironmentFailure, ExtensionError
from verst.fields import Opaque, PerToken
from verst.rollout.agent import AgentEnvironment, Agents
from verst.rollout.boundary import GuardedEnvironment
from verst.rollout.endpoint import LARGEST_REQUEST
from verst.rollout.environments import environment_factory
from verst.rollout.sessions import Session, SessionRefused
from verst.types import Completion, FinishReason, Message, Prompt, Reply

PROMPT = Prompt("p", (Message("user", "2 + 2?"),), {"answer": "4"})
RULES = {"role": "system", "content": "Rules"}
ASK = {"role": "user", "content": "2 + 2?"}


def said(text: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, (1, 2), finish)


Open = Callable[..., GuardedEnvironment]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Makes the environment of an agent, and closes all of them."""
    made: list[tuple[Agents, GuardedEnvironment]] = []

    def open_one(agent: Any, **options: Any) -> GuardedEnvironment:
        agents = Agents(agent, **options)
        made.append((agents, GuardedEnvironment(agents, deadline_s=5)))
        return made[-1][1]

    yield open_one
    for agents, environment in made:
        await environment.close()
        await agents.close()


def client(session: Session, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0, **options)


async def test_an_agent_that_knows_base_url_and_key_is_an_environment(opened: Open):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            messages: list[Any] = [RULES, {"role": "user", "content": prompt.messages[0].content}]
            first = await api.chat.completions.create(model="any", messages=messages, temperature=0.3)
            messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Sure?"}]
            second = await api.chat.completions.create(model="any", messages=messages)
        return {"changed": first.choices[0].message.content != second.choices[0].message.content, "why": second.choices[0].finish_reason}

    environment = opened(solve)
    assert await environment.start(PROMPT) == (Message("system", "Rules"), Message("user", "2 + 2?"))
    assert await environment.reply(said("5 ")) == Reply((Message("user", "Sure?"),), done=False)
    assert await environment.reply(said("4", FinishReason.LENGTH)) == Reply(
        info={"changed": True, "why": "length", "not_heeded": ["temperature"]}
    )


async def test_fields_that_an_agent_returns_are_in_the_info_of_its_last_reply(opened: Open):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            await api.chat.completions.create(model="any", messages=[ASK])  # type: ignore[list-item]
        return {"tries": 1, "each": PerToken([0.5, 1]), "note": Opaque(("a", 1))}

    environment = opened(solve)
    await environment.start(PROMPT)
    assert await environment.reply(said("4")) == Reply(info={"tries": 1, "each": PerToken([0.5, 1]), "note": Opaque(["a", 1])})


async def test_a_plain_function_with_a_plain_client(opened: Open):
    def solve(session: Session, prompt: Prompt, *, times: int) -> None:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            assert [model.id for model in api.models.list()] == ["policy"]
            messages: list[Any] = [ASK]
            for _ in range(times):
                chunks = list(api.chat.completions.create(model="policy", messages=messages, stream=True))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                assert chunks[-1].choices[0].finish_reason == "stop"
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]

    environment = opened(solve, times=2)
    await environment.start(PROMPT)
    assert (await environment.reply(said("four"))).messages == (Message("user", "Again."),)
    assert await environment.reply(said("4")) == Reply()


async def test_an_agent_may_ask_without_http(opened: Open):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        return {"text": (await session.complete(prompt.messages)).text}

    environment = opened(solve)
    assert await environment.start(PROMPT) == PROMPT.messages
    assert await environment.reply(said("4")) == Reply(info={"text": "4"})


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ([ASK], "nothing new to answer"),
        ([ASK, {"role": "assistant", "content": "4"}], "nothing new to answer"),
        ([ASK, {"role": "assistant", "content": "5"}, ASK], "message 1 is assistant '5', but in this session it was assistant '4'"),
        ([{"role": "user", "content": "3 + 3?"}], "message 0 is user '3"),
        ([ASK, {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "x"}, ASK], "only the policy speaks"),
    ],
)
async def test_a_call_that_does_not_continue_the_conversation_fails_the_trajectory(opened: Open, second: list[Any], reason: str):
    async def solve(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            await api.chat.completions.create(model="m", messages=[ASK])  # type: ignore[list-item]
            await api.chat.completions.create(model="m", messages=second)

    environment = opened(solve)
    await environment.start(PROMPT)
    with pytest.raises(EnvironmentFailure, match=reason):
        await environment.reply(said("4"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "JSON object with a list of messages"),
        (b'{"messages": []}', "JSON object with a list of messages"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has no text"),
        (b'{"messages": ["hi"]}', "message 0 must be an object"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "parts that are no text"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', "n must be 1"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', "tool 0 must be of the type function"),
        (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}', "text only"),
        (b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}', "message 0 has tool_calls"),
        (b"\xff\xfe", "codec"),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why_and_changes_nothing(opened: Open, body: bytes, reason: str):
    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with httpx.AsyncClient() as http:
            headers = {"Authorization": f"Bearer {session.api_key}"}
            refused = await http.post(f"{session.base_url}/chat/completions", content=body, headers=headers)
        await session.complete([ASK])
        return {"status": refused.status_code, "message": refused.json()["error"]["message"]}

    environment = opened(solve)
    assert await environment.start(PROMPT) == PROMPT.messages
    info = (await environment.reply(said("4"))).info
    assert info["status"] == 400
    assert reason in info["message"]


async def test_keys_are_good_for_one_trajectory_until_it_ends(opened: Open):
    sessions: list[Session] = []

    async def solve(session: Session, prompt: Prompt) -> None:
        sessions.append(session)
        await session.complete([ASK])

    async with httpx.AsyncClient() as http:

        async def status(key: str, scheme: str = "Bearer") -> int:
            answer = await http.post(f"{sessions[0].base_url}/chat/completions", json={}, headers={"Authorization": f"{scheme} {key}"})
            return answer.status_code

        environment = opened(solve)
        await environment.start(PROMPT)
        assert len(sessions[0].api_key) >= 32
        assert await status("guessed") == 401
        assert await status(sessions[0].api_key, "Basic") == 401
        assert await status(sessions[0].api_key) == 400  # known; its body is not a request
        assert await environment.reply(said("4")) == Reply()
        await environment.close()
        assert await status(sessions[0].api_key) == 410
    with pytest.raises(SessionRefused, match="has ended"):
        await sessions[0].complete([ASK])


async def test_a_client_that_leaves_and_tries_again_gets_the_answer_that_was_generated(opened: Open):
    left = asyncio.Event()

    async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session, timeout=0.2) as hasty:
            with pytest.raises(openai.APITimeoutError):
                await hasty.chat.completions.create(model="m", messages=[ASK])  # type: ignore[list-item]
        left.set()
        async with client(session) as api:  # as OpenAI's client does by itself
            header = {"x-stainless-retry-count": "1"}
            answer = await api.chat.completions.create(model="m", messages=[ASK], extra_headers=header)  # type: ignore[list-item]
        return {"text": answer.choices[0].message.content}

    environment = opened(solve)
    await environment.start(PROMPT)
    await left.wait()
    assert await environment.reply(said("4")) == Reply(info={"text": "4"})


async def test_two_calls_at_once_are_no_conversation(opened: Open):
    async def solve(session: Session, prompt: Prompt) -> None:
        await asyncio.gather(session.complete([ASK]), session.complete([RULES]))

    environment = opened(solve)

    async def first_turn() -> None:
        await environment.start(PROMPT)
        await environment.reply(said("4"))

    with pytest.raises(EnvironmentFailure, match="still being generated: a session is one conversation"):
        await first_turn()


async def test_an_agent_that_raises_asks_nothing_or_returns_no_mapping_fails_its_trajectory(opened: Open):
    async def raises(session: Session, prompt: Prompt) -> None:
        raise LookupError("no such room")

    async def silent(session: Session, prompt: Prompt) -> None: ...

    async def text(session: Session, prompt: Prompt) -> Any:
        await session.complete([ASK])
        return "done"

    with pytest.raises(EnvironmentFailure, match=r"no such room \(.*test_agent.py"):
        await opened(raises).start(PROMPT)
    with pytest.raises(EnvironmentFailure, match="ended without asking"):
        await opened(silent).start(PROMPT)
    environment = opened(text)
    await environment.start(PROMPT)
    with pytest.raises(EnvironmentFailure, match="returned 'done' of type str, not a mapping or None"):
        await environment.reply(said("4"))


async def test_the_end_of_a_trajectory_ends_an_agent_that_waits(opened: Open):
    ended = asyncio.Event()

    async def solve(session: Session, prompt: Prompt) -> None:
        try:
            await session.complete([ASK])
        finally:
            ended.set()

    environment = opened(solve)
    await environment.start(PROMPT)
    assert await environment.close() is None
    assert ended.is_set()


async def test_a_thread_whose_trajectory_is_over_is_refused(opened: Open):
    refused: list[str] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def solve(session: Session, prompt: Prompt) -> None:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            try:
                api.chat.completions.create(model="m", messages=[ASK])  # type: ignore[list-item]
            except openai.APIStatusError as error:
                refused.append(str(error))
        loop.call_soon_threadsafe(done.set)

    environment = opened(solve)
    await environment.start(PROMPT)
    await environment.close()
    await asyncio.wait_for(done.wait(), 5)
    assert "has ended" in refused[0]


def never(session: Session, prompt: Prompt) -> None: ...


def wrong(session: Session) -> None: ...


def test_a_reference_with_the_prefix_names_an_agent():
    made = environment_factory("agent:tests.unit.test_agent:never", {})
    assert isinstance(made, Agents)
    assert made.function is never
    assert isinstance(made(), AgentEnvironment)
    assert environment_factory(made, {}) is made
    with pytest.raises(ExtensionError, match=r"agent wrong\(session.*cannot be called as wrong\(session, prompt\)"):
        environment_factory("agent:tests.unit.test_agent:wrong", {})
    with pytest.raises(ExtensionError, match="has no 'nobody'"):
        environment_factory("agent:tests.unit.test_agent:nobody", {})
    assert pickle.loads(cloudpickle.dumps(made)).function is never


async def test_an_answer_that_was_cut_ends_its_agent_in_order(opened: Open):
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
        return {"first": first.choices[0].message.content}

    for heeds, said_of_it in ((True, {"first": "cut"}), (False, {})):
        environment = opened(solve, heeds=heeds)
        await environment.start(PROMPT)
        reply = await environment.reply(said("cut", FinishReason.LENGTH))
        assert reply == Reply(info={**said_of_it, "not_heeded": ["temperature"]})


async def test_an_agent_that_goes_on_after_its_answer_was_cut_is_ended(opened: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.rollout.agent._ORDERLY_S", 0.1)

    async def stubborn(session: Session, prompt: Prompt) -> None:
        messages: list[Any] = [ASK]
        while True:
            with contextlib.suppress(SessionRefused):
                answer = await session.complete(messages)
                messages += [{"role": "assistant", "content": answer.text}, ASK]
            await asyncio.sleep(0.01)

    environment = opened(stubborn)
    await environment.start(PROMPT)
    assert await environment.reply(said("cut", FinishReason.LENGTH)) == Reply()


async def test_a_client_that_leaves_in_the_middle_of_a_stream_fails_nobody_elses_trajectory(opened: Open):
    async def leaves(session: Session, prompt: Prompt) -> dict[str, Any]:
        api = client(session)
        stream = await api.chat.completions.create(model="m", messages=[ASK], stream=True)  # type: ignore[list-item]
        await anext(stream)
        await api.close()  # with most of the answer unread
        async with client(session) as other:
            messages: list[Any] = [ASK, {"role": "assistant", "content": "x" * 2_000_000}, ASK]
            again = await other.chat.completions.create(model="m", messages=messages)
        return {"again": again.choices[0].message.content}

    environment = opened(leaves)
    await environment.start(PROMPT)
    assert (await environment.reply(said("x" * 2_000_000))).messages == (Message("user", "2 + 2?"),)
    assert await environment.reply(said("4")) == Reply(info={"again": "4"})


async def test_a_client_that_leaves_for_good_ends_with_its_agents_deadline(opened: Open):
    async def leaves(session: Session, prompt: Prompt) -> None:
        async with client(session, timeout=0.1) as hasty:
            await hasty.chat.completions.create(model="m", messages=[ASK])  # type: ignore[list-item]

    environment = opened(leaves)
    await environment.start(PROMPT)
    await asyncio.sleep(0.5)
    with pytest.raises(EnvironmentFailure, match=r"raised openai\.APITimeoutError"):
        await environment.reply(said("4"))


async def test_an_agent_that_never_asks_again_has_its_deadline():
    async def hangs(session: Session, prompt: Prompt) -> None:
        await session.complete([ASK])
        await asyncio.Event().wait()

    agents = Agents(hangs)
    environment = GuardedEnvironment(agents, deadline_s=0.3)
    await environment.start(PROMPT)
    with pytest.raises(EnvironmentFailure, match=r"reply in turn 1 took longer than 0\.3 s"):
        await environment.reply(said("4"))
    assert await environment.close() is None
    await agents.close()


async def test_a_request_that_is_too_large_says_so(opened: Open):
    async def solve(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            messages: list[Any] = [{"role": "user", "content": "x" * (LARGEST_REQUEST + 1)}]
            await api.chat.completions.create(model="m", messages=messages)

    with pytest.raises(EnvironmentFailure, match=r"413 .*at most 16777216 bytes: cut what tools have printed"):
        await opened(solve).start(PROMPT)
