"""Tools of an agent: told to the model by its template, called in its tokens, and told to the agent as OpenAI's clients know it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_agent import LIMITS, LONG, client, saying
from tests.unit.test_roll import END, PROMPT, ids, roller
from verst.data.chat import ChatRenderer
from verst.errors import DataError, ModelError
from verst.rollout.agent import Agents
from verst.rollout.environments import SingleTurn
from verst.rollout.sessions import Session
from verst.rollout.tool_calls import Malformed, ToolCall, split_calls
from verst.testing import CHATML, FakeEngine, tiny_tokenizer
from verst.types import Message, Prompt, Status, Trajectory

QWEN_TOOLS = (  # as that of Qwen 2.5, with fewer words
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    '{{- \'\n</tools>\nCall:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n\' }}{%- endif %}'
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content }}{%- for call in m.tool_calls or [] %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{- call.function.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "description": "Adds, never says <|im_end|>.", "parameters": NUMBERS}}
NOW: Any = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
ASK: Any = {"role": "user", "content": "6x7?"}


def call(name: str = "add", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def solve(session: Session, prompt: Prompt) -> dict[str, Any]:
    """A loop over tools as everybody writes it, which knows nothing of Verst but base URL and key."""
    messages: list[Any] = [{"role": m.role, "content": m.content} for m in prompt.messages]
    async with client(session) as api:
        while True:
            choice = (await api.chat.completions.create(model="m", messages=messages, tools=[ADD, NOW])).choices[0]
            messages.append(choice.message)
            if choice.finish_reason != "tool_calls":
                return {"answer": choice.message.content}
            for made in choice.message.tool_calls or ():
                assert made.type == "function"
                arguments = json.loads(made.function.arguments)
                result = arguments["a"] + arguments["b"] if made.function.name == "add" else "noon"
                messages.append({"role": "tool", "tool_call_id": made.id, "content": str(result)})


def with_tools(engine: FakeEngine, environment: Any, template: str = QWEN_TOOLS) -> Any:
    made = roller(engine, environment, **LIMITS)
    object.__setattr__(made, "renderer", ChatRenderer(tiny_tokenizer(template)))
    return made


async def test_an_agent_that_calls_tools_is_exact_to_the_token():
    texts = ["I add." + "\n" + call(a=3, b=4) + "\n" + call("now"), call(a=40, b=2), "42"]
    engine = FakeEngine([[*ids(text), END] for text in texts])
    agents = Agents(solve)
    (trajectory,) = (await with_tools(engine, agents).roll(0, PROMPT)).trajectories
    await agents.close()
    assert (trajectory.status, trajectory.info, trajectory.error) == (Status.FINISHED, {"answer": "42"}, None)
    tokenizer = tiny_tokenizer(QWEN_TOOLS)

    def calls(*made: tuple[str, Any]) -> list[Any]:
        return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in made]

    conversation: list[Any] = [
        ASK,
        {"role": "assistant", "content": "I add.", "tool_calls": calls(("add", {"a": 3, "b": 4}), ("now", {}))},
        *({"role": "tool", "content": text} for text in ("7", "noon")),
        {"role": "assistant", "content": "", "tool_calls": calls(("add", {"a": 40, "b": 2}))},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42"},
    ]
    text = str(tokenizer.apply_chat_template(conversation, tools=[ADD, NOW], tokenize=False)).removesuffix("\n")
    text = text.replace("assistant\n\n<tool_call>", "assistant\n<tool_call>")  # the template's newline after no words
    assert tokenizer.decode(trajectory.tokens_T) == text
    trained = [tokenizer.decode(trajectory.tokens_T[turn.generated : turn.end]) for turn in trajectory.turns]
    assert trained == [f"{text}<|im_end|>" for text in texts]
    assert int(trajectory.loss_mask_T.sum()) == sum(len(ids(text)) + 1 for text in texts)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert trajectory.tokens_T.tolist().count(ends) == 7  # of each message that the template writes; none from a tool's description
    assert [m.role for m in trajectory.messages] == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]


async def test_environments_have_tools_too():
    class Told(SingleTurn):
        tools = (ADD,)

    engine = FakeEngine([[*ids("x"), END]])
    (trajectory,) = (await with_tools(engine, Told).roll(0, PROMPT)).trajectories
    assert '"name": "add"' in tiny_tokenizer().decode(trajectory.tokens_T[: trajectory.turns[0].generated])


@pytest.mark.parametrize("tools", ["add", [1], [{"x": {1}}], 5])
async def test_what_an_environment_calls_tools_is_checked(tools: Any):
    class Wrong(SingleTurn):
        pass

    Wrong.tools = tools  # type: ignore[attr-defined]
    (trajectory,) = (await with_tools(FakeEngine([]), Wrong).roll(0, PROMPT)).trajectories
    assert "Wrong: tools" in str(trajectory.error)


async def test_tools_that_raise_fail_their_trajectory():
    class Breaks(SingleTurn):
        @property
        def tools(self) -> Any:
            raise LookupError("no such tool")

    (trajectory,) = (await with_tools(FakeEngine([]), Breaks).roll(0, PROMPT)).trajectories
    assert "Breaks: tools raised LookupError: no such tool" in str(trajectory.error)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML, "does not tell a model of tools"),
        (QWEN_TOOLS.replace('{\\"name', '<function=a>{\\"name').replace("Call:", "<function=x>"), "form"),
    ],
)
async def test_a_template_that_knows_no_tools_ends_the_run_with_the_reason(template: str, reason: str):
    agents = Agents(solve)
    with pytest.raises(ModelError, match=reason):
        await with_tools(FakeEngine([]), agents, template).roll(0, PROMPT)
    await agents.close()


class Armed(SingleTurn):
    """Each has other tools."""

    def __init__(self, tools: list[Any]) -> None:
        self.tools = tools.pop(0)


async def test_tools_that_cannot_be_told_fail_their_own_trajectory_and_not_the_prompt():
    """Which is told by it, if it is too long alone."""
    naming = QWEN_TOOLS.replace("{{- tool | tojson }}", "{{- tool.function.parameters.type }}")
    fine = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    long = {"type": "function", "function": {"name": "f", "parameters": {"type": "x" * 100}}}
    bare = {"type": "function", "function": {"name": "f"}}
    rolling = replace(roller(FakeEngine([[END]] * 4), group_size=3, max_prompt_tokens=200), renderer=ChatRenderer(tiny_tokenizer(naming)))
    too_many, refused, whole = (await replace(rolling, environment=partial(Armed, [[long], [bare], [fine]])).roll(0, PROMPT)).trajectories
    assert too_many.error == (
        "the prompt with its tools has 229 tokens, where 1 to 200 can be: shorten it, or raise data.max_prompt_tokens (200)"
    )
    assert str(refused.error).startswith("the prompt with its tools cannot be rendered: the chat template refuses")
    assert whole.status is Status.FINISHED
    with pytest.raises(DataError, match=r"prompt p:0 .* has 23 tokens, above the limit of 8"):
        await replace(rolling, environment=partial(Armed, [[fine]] * 3), max_prompt_tokens=8).roll(0, PROMPT)


def test_a_template_that_moves_its_tools_cannot_be_continued():
    moving = QWEN_TOOLS.replace("{%- if tools %}", "{%- if tools and messages|length == 1 %}")
    renderer = ChatRenderer(tiny_tokenizer(moving))
    renderer.require_continuable()
    with pytest.raises(ModelError, match="cannot be used for several turns"):
        renderer.continuation([Message("tool", "7")], last=renderer.end_of_turn, tools=[ADD])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("42 ", ("42 ", ())),
        ("a <tool_call> b", "has no </tool_call>"),
        (call("now"), ("", (ToolCall("now", "{}"),))),
        (f" Let me. {call(a=1)} and {call(b='é')} so", ("Let me.  and  so", (ToolCall("add", '{"a": 1}'), ToolCall("add", '{"b": "é"}')))),
        (f"<think>{call()}?</think>\nno", (f"<think>{call()}?</think>\nno", ())),
        (f"<think>hm</think>\n{call()}", ("<think>hm</think>", (ToolCall("add", "{}"),))),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", (ToolCall("f", '{"a": 1}'),))),
        (f"{call()}<tool_call>{{'name': 1}}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not of the expected form"),
        ('<tool_call>{"name": ["f"], "arguments": {}}</tool_call>', "not of the expected form"),
        ('<tool_call>{"arguments": {}}</tool_call>', "not of the expected form"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_calls_in_a_text(text: str, found: Any):
    result = split_calls(text)
    if isinstance(found, str):
        assert isinstance(result, Malformed)
        assert found in result.reason
    else:
        assert result == found


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "</think>", '{"name": "f", "arguments": {}}', "{", '"', "x\n"]), max_size=8)
)
def test_any_text_is_read(pieces: list[str]):
    text = "".join(pieces)
    found = split_calls(text)
    if not isinstance(found, Malformed):
        said_text, calls = found
        assert calls or said_text == text
        for made in calls:
            assert json.loads(made.arguments) == {}


async def answered(agent: Any, *texts: str, template: str = QWEN_TOOLS) -> Trajectory:
    """The trajectory of an agent whose policy says these texts."""
    agents = Agents(agent)
    try:
        (trajectory,) = (await with_tools(saying(*texts), agents, template).roll(0, PROMPT)).trajectories
    finally:
        await agents.close()
    return trajectory


async def test_malformed_calls_come_back_as_text_and_are_counted():
    bad = '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>'

    async def tries(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            choice = (await api.chat.completions.create(model="m", messages=[ASK], tools=[ADD])).choices[0]
        return {"text": choice.message.content, "calls": choice.message.tool_calls, "finish": choice.finish_reason}

    assert (await answered(tries, bad)).info == {"text": bad, "calls": None, "finish": "stop", "malformed_calls": 1}


async def test_tool_choice_none_leaves_calls_in_the_text():
    async def tries(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            choice = (await api.chat.completions.create(model="m", messages=[ASK], tools=[ADD], tool_choice="none")).choices[0]
        return {"text": choice.message.content, "calls": choice.message.tool_calls}

    assert (await answered(tries, call())).info == {"text": call(), "calls": None}


async def test_calls_are_streamed():
    def tries(session: Session, prompt: Prompt) -> dict[str, Any]:
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as api:
            with api.chat.completions.stream(model="m", messages=[ASK], tools=[ADD], parallel_tool_calls=False) as stream:
                choice = stream.get_final_completion().choices[0]
            (made,) = choice.message.tool_calls or [None]
            assert made is not None
        return {"finish": choice.finish_reason, "name": made.function.name, "arguments": made.function.arguments}

    info = {"finish": "tool_calls", "name": "add", "arguments": '{"a": 1}', "not_heeded": ["parallel_tool_calls"]}
    assert (await answered(tries, call(a=1))).info == info


def again(messages: Any, tools: Any = (ADD,)) -> Any:
    """An agent that asks, and then sends the conversation that `messages` makes of the answer."""

    async def tries(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            first = (await api.chat.completions.create(model="m", messages=[ASK], tools=[ADD])).choices[0].message.model_dump()
            second = await api.chat.completions.create(model="m", messages=messages(first), tools=list(tools))
        return {"second": second.choices[0].message.content}

    return tries


def result(first: Any) -> Any:
    return {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": [{"type": "text", "text": "7"}]}


def rewritten(first: Any, **changes: Any) -> Any:
    (made,) = first["tool_calls"]
    return {**first, "tool_calls": [{**made, "function": {**made["function"], **changes}}]}


async def test_an_agent_may_write_the_same_json_in_another_way():
    kept = again(lambda first: [ASK, rewritten(first, arguments='{"b":4,"a":3}'), result(first)])
    assert (await answered(kept, call(a=3, b=4), "7")).info == {"second": "7"}


@pytest.mark.parametrize(
    ("tries", "given"),
    [
        (again(lambda first: [ASK, rewritten(first, arguments='{"a": 5}'), result(first)]), call(a=5)),
        (again(lambda first: [ASK, rewritten(first, name="now"), result(first)]), call("now", a=3, b=4)),
        (again(lambda first: [ASK, {"role": "assistant", "content": "x"}, result(first)]), "x"),
        (again(lambda first: [ASK, first, result(first)], tools=(ADD, NOW)), call(a=3, b=4)),
    ],
)
async def test_another_call_or_other_tools_are_another_conversation(tries: Any, given: str):
    trajectory = await answered(tries, call(a=3, b=4), "7")
    (branch,) = trajectory.branches
    assert [m.content for m in trajectory.messages] == ["6x7?", given, "7", "7"]
    assert [m.content for m in branch.messages] == ["6x7?", call(a=3, b=4)]
    assert trajectory.loss_mask_T.sum() == len(ids("7")) + 1
    assert branch.loss_mask_T.sum() == len(ids(call(a=3, b=4))) + 1


async def test_calls_that_nobody_sampled_are_written_as_the_template_writes_them():
    """Of an agent that keeps its newest messages and sums up those before."""

    def compacted(first: Any) -> Any:
        return [{"role": "user", "content": "6x7, so far:"}, {**first, "content": "I add."}, result(first)]

    trajectory = await answered(again(compacted), call(a=3, b=4), "7")
    made = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
    conversation: list[Any] = [
        {"role": "user", "content": "6x7, so far:"},
        {"role": "assistant", "content": "I add.", "tool_calls": [made]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7"},
    ]
    tokenizer = tiny_tokenizer(QWEN_TOOLS)
    text = tokenizer.apply_chat_template(conversation, tools=[ADD], tokenize=False)
    assert tokenizer.decode(trajectory.tokens_T) == str(text).removesuffix("\n")


async def test_only_the_assistant_calls_tools():
    tries = again(lambda first: [ASK, first, {**first, "role": "user"}])
    assert "only the assistant calls tools" in str((await answered(tries, call(a=3, b=4))).error)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tools": [ADD], "tool_choice": "required"}, "tool_choice must be auto or none"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice must be auto or none"),
        ({"tools": {"add": 1}}, "tools must be a list"),
        ({"tools": [{"type": "web_search"}]}, "tool 0 must be of the type function"),
        ({"tools": [{"type": "function", "function": {"name": 1}}]}, "tool 0 must be of the type function"),
        ({"functions": [{"name": "add"}]}, "functions: not supported"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "message 0 has tool_calls that are none"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "message 0 has tool_calls that are none"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": "{}"}}]}]},
            "whose id, name or arguments are no text",
        ),
        ({"response_format": "text"}, "text only"),
    ],
)
async def test_requests_that_cannot_be_answered_say_why(extra: Any, reason: str):
    async def tries(session: Session, prompt: Prompt) -> None:
        async with client(session) as api:
            await api.chat.completions.create(model="m", messages=[ASK], extra_body=extra)

    assert reason in str((await answered(tries)).error)


async def test_a_call_that_was_cut_by_its_limit_is_text():
    async def tries(session: Session, prompt: Prompt) -> dict[str, Any]:
        async with client(session) as api:
            choice = (await api.chat.completions.create(model="m", messages=[ASK], tools=[ADD])).choices[0]
        return {"finish": choice.finish_reason, "calls": choice.message.tool_calls}

    trajectory = await answered(tries, f"<tool_call>{LONG}")
    assert trajectory.status is Status.TRUNCATED
    assert trajectory.info == {"finish": "length", "calls": None, "malformed_calls": 1}
