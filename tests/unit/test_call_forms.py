"""The forms in which templates ask for calls of tools: read from what a model wrote, written where nobody sampled them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.unit.test_agent_tools import ADD, ASK, NOW, QWEN_TOOLS, again, answered, result, solve
from verst.data.call_forms import JSON, PAIRS, PAIRS_ON_LINES, TAGS, CallForm, Malformed, ToolCall, asked_for
from verst.data.chat import ChatRenderer
from verst.errors import ModelError
from verst.rollout.tool_calls import split_calls
from verst.testing import tiny_tokenizer
from verst.types import Message, Status

BEFORE_CALLS, AFTER_CALLS = QWEN_TOOLS.index("{%- for call in"), QWEN_TOOLS.index("{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}")
ASKS_FOR_JSON = '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'


def asking(form: str, calls: str) -> str:
    """Qwen 2.5's template, which asks for another form and writes calls in it."""
    whole = QWEN_TOOLS[:BEFORE_CALLS] + calls + QWEN_TOOLS[AFTER_CALLS:]
    assert ASKS_FOR_JSON in whole
    return whole.replace(ASKS_FOR_JSON, form)


TAG_TOOLS = asking(  # as Qwen 3.5 does
    "<tool_call>\n<function=example>\n<parameter=first>\nvalue\n</parameter>\n</function>\n</tool_call>",
    "{%- for call in m.tool_calls or [] %}{{- ('\n\n' if m.content else '') if loop.first else '\n' }}"
    "{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}{%- for key, value in call.function.arguments | items %}"
    "{{- '<parameter=' + key + '>\n' }}"
    "{{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}"
    "{{- '\n</parameter>\n' }}{%- endfor %}{{- '</function>\n</tool_call>' }}{%- endfor %}",
)
PAIR_TOOLS = asking(  # as GLM-4.7 does
    "<tool_call>{name}<arg_key>{key-1}</arg_key><arg_value>{value-1}</arg_value>...</tool_call>",
    "{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.function.name }}"
    "{%- for key, value in call.function.arguments | items %}{{- '<arg_key>' + key + '</arg_key><arg_value>' }}"
    "{{- value if value is string else value | tojson }}{{- '</arg_value>' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}",
)
PAIR_LINES_TOOLS = asking(  # as GLM-4.5 does
    "<tool_call>{name}\n<arg_key>{key-1}</arg_key>\n<arg_value>{value-1}</arg_value>\n...\n</tool_call>",
    "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + call.function.name + '\n' }}"
    "{%- for key, value in call.function.arguments | items %}{{- '<arg_key>' + key + '</arg_key>\n<arg_value>' }}"
    "{{- value if value is string else value | tojson }}{{- '</arg_value>\n' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}",
)
FORMS = {
    "json": (QWEN_TOOLS, JSON),
    "tags": (TAG_TOOLS, TAGS),
    "pairs": (PAIR_TOOLS, PAIRS),
    "pairs on lines": (PAIR_LINES_TOOLS, PAIRS_ON_LINES),
}
WRITTEN = {  # what each model writes to call add(a=3, b=4), and now()
    "json": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>',
        '<tool_call>{"name":"now","arguments":{}}</tool_call>',
    ),
    "tags": (
        "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n4\n</parameter>\n</function>\n</tool_call>",
        "<tool_call><function=now></function></tool_call>",
    ),
    "pairs": (
        "<tool_call>add<arg_key>a</arg_key><arg_value>3</arg_value><arg_key>b</arg_key><arg_value>4</arg_value></tool_call>",
        "<tool_call>now</tool_call>",
    ),
    "pairs on lines": (
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n<arg_key>b</arg_key>\n<arg_value>4</arg_value>\n</tool_call>",
        "<tool_call>now\n</tool_call>",
    ),
}


def calling(*made: tuple[str, Any]) -> list[Any]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in made]


@pytest.mark.parametrize("name", FORMS)
def test_a_template_tells_which_form_it_asks_for(name: str):
    template, form = FORMS[name]
    assert ChatRenderer(tiny_tokenizer(template)).call_form is form


@pytest.mark.parametrize("name", FORMS)
async def test_an_agent_calls_tools_in_each_form(name: str):
    """The usual loop over tools, whose sums need numbers: they are told from text by the tool's schema."""
    adds, now = WRITTEN[name]
    texts = [f"I add.\n{adds}\n{now}", adds, "42"]
    trajectory = await answered(solve, *texts, template=FORMS[name][0])
    assert (trajectory.status, trajectory.info, trajectory.error) == (Status.FINISHED, {"answer": "42"}, None)
    told = [message.content for message in trajectory.messages if message.role == "tool"]
    assert (told, trajectory.branches) == (["7", "noon", "7"], ())
    tokenizer = tiny_tokenizer()
    generated = [tokenizer.decode(trajectory.tokens_T[turn.generated : turn.end]) for turn in trajectory.turns]
    assert generated == [f"{text}<|im_end|>" for text in texts]


@pytest.mark.parametrize("name", FORMS)
async def test_calls_that_nobody_sampled_are_written_as_each_template_writes_them(name: str):
    template = FORMS[name][0]
    arguments = {"a": 3, "b": 4, "how": {"exact": True, "by": ["hé", None]}, "note": "two\nlines", "sure": True, "limit": None}
    made = {"id": "x", "type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}

    def compacted(first: Any) -> Any:
        return [
            {"role": "user", "content": "so far:"},
            {"role": "assistant", "content": "I add.", "tool_calls": [made, made]},
            result(first),
        ]

    trajectory = await answered(again(compacted), WRITTEN[name][0], "7", template=template)
    conversation: list[Any] = [
        {"role": "user", "content": "so far:"},
        {"role": "assistant", "content": "I add.", "tool_calls": calling(("add", arguments), ("add", arguments))},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7"},
    ]
    tokenizer = tiny_tokenizer(template)
    text = str(tokenizer.apply_chat_template(conversation, tools=[ADD], tokenize=False)).removesuffix("\n")
    assert tokenizer.decode(trajectory.tokens_T) == text


@pytest.mark.parametrize("name", FORMS)
async def test_a_last_call_without_tools_has_the_calls_before_it_in_the_same_form(name: str):
    """An agent that wants an answer now leaves the tools out, and the conversation is another one."""
    trajectory = await answered(again(lambda first: [ASK, first, result(first)], tools=()), WRITTEN[name][0], "7", template=FORMS[name][0])
    asked = next(message.content for message in trajectory.messages if message.role == "assistant")
    assert split_calls(asked, FORMS[name][1], [ADD]) == ("", (ToolCall("add", '{"a": 3, "b": 4}'),))
    assert len(trajectory.branches) == 1


def typed(**properties: Any) -> list[Any]:
    return [NOW, {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({}, "5", "5"),
        ("of no kind", "5", "5"),
        ({"type": {"not": "a type"}}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, " -1.5e3 ", -1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "5", "5"),
        ({"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]}, "red", "red"),  # pydantic's, of an enumeration
        ({"anyOf": [{}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"enum": ["red"]}, {"type": "null"}]}, "null", None),
        ({"type": "boolean"}, " True ", True),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"é": {"b": null}}', {"é": {"b": None}}),
    ],
)
def test_a_value_is_what_its_schema_declares(schema: Any, text: str, value: Any):
    tools = typed(a=schema)
    for form, body in (
        (TAGS, f"\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n"),
        (TAGS, f"<function=f><parameter=a>{text}</parameter></function>"),
        (PAIRS, f"f<arg_key>a</arg_key><arg_value>{text}</arg_value>"),
        (PAIRS_ON_LINES, f"f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n"),
    ):
        found = form.read(body, tools)
        assert isinstance(found, ToolCall)
        assert (found.name, json.loads(found.arguments)) == ("f", {"a": value})


def test_the_name_of_a_function_may_have_blanks_around_it():
    found = TAGS.read("<function= f ><parameter= a >5</parameter></function>", typed(a={"type": "integer"}))
    assert found == ToolCall("f", '{"a": 5}')


@pytest.mark.parametrize("parameters", [None, "x", {"properties": [1]}, {"properties": {"a": 1}}])
def test_tools_without_a_schema_have_text(parameters: Any):
    tools: list[Any] = [{"type": "function"}, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert TAGS.read("<function=f><parameter=a>5</parameter></function>", tools) == ToolCall("f", '{"a": "5"}')
    assert PAIRS.read("g<arg_key>a</arg_key><arg_value>5</arg_value>", tools) == ToolCall("g", '{"a": "5"}')


@pytest.mark.parametrize(
    ("form", "body", "reason"),
    [
        (TAGS, '{"name": "f", "arguments": {}}', "not of the expected form: <function=NAME>"),
        (TAGS, "<function=f>", "not of the expected form"),
        (TAGS, "<function=></function>", "not of the expected form"),
        (TAGS, "<function= ></function>", "not of the expected form"),
        (TAGS, '<function=f><parameter=b>["\\ud800"]</parameter></function>', "half of a surrogate pair"),
        (JSON, '{"name": "f", "arguments": {"a": "\\ud800"}}', "half of a surrogate pair"),
        (JSON, '{"name": "\\ud800", "arguments": {}}', "half of a surrogate pair"),
        (TAGS, "<function=f></function> and", "not of the expected form"),
        (TAGS, "<function=f>so<parameter=a>5</parameter></function>", "not of the expected form"),
        (TAGS, "<function=f><parameter=a>5</function>", "not of the expected form"),
        (TAGS, "<function=f><parameter=a>five</parameter></function>", "a of f is to be integer, and is not (Expecting value"),
        (TAGS, "<function=f><parameter=a>NaN</parameter></function>", "NaN is no JSON"),
        (TAGS, "<function=f><parameter=a>1e400</parameter></function>", "The arguments of 'f' are not JSON"),
        (JSON, '{"name": "f", "arguments": {"a": -1e400}}', "The arguments of 'f' are not JSON"),
        (TAGS, "<function=f><parameter=a>" + "[" * 100_000 + "</parameter></function>", "a of f is to be integer"),
        (PAIRS, '{"name": "f", "arguments": {}}', "not of the expected form: NAME <arg_key>"),
        (PAIRS, "", "not of the expected form"),
        (PAIRS, "<arg_key>a</arg_key><arg_value>5</arg_value>", "not of the expected form"),
        (PAIRS, "two words", "not of the expected form"),
        (PAIRS, "f<arg_key>a</arg_key>", "not of the expected form"),
        (PAIRS, "f<arg_key>a</arg_key><arg_value>5", "not of the expected form"),
        (PAIRS, "f<arg_key>a<arg_key>b</arg_key><arg_value>5</arg_value>", "not of the expected form"),
        (PAIRS, "f<arg_key>a</arg_key><arg_value>5.5.</arg_value>", "a of f is to be integer"),
    ],
)
def test_what_is_no_call_says_why(form: CallForm, body: str, reason: str):
    found = form.read(body, typed(a={"type": "integer"}, b={"type": "array"}))
    assert isinstance(found, Malformed)
    assert reason in found.reason
    assert len(found.reason) < 300


def test_a_type_of_any_length_makes_no_long_message():
    found = TAGS.read("<function=f><parameter=a>five</parameter></function>", typed(a={"type": "x" * 1000}))
    assert isinstance(found, Malformed)
    assert len(found.reason) < 300


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=6,
)


def kind(value: Any) -> dict[str, Any]:
    kinds: dict[type, str] = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    return {"type": kinds[type(value)]}


@pytest.mark.parametrize("form", [JSON, TAGS, PAIRS, PAIRS_ON_LINES])
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4), st.sampled_from(["", "I add."]))
def test_what_was_written_is_read_as_it_was(form: CallForm, arguments: dict[str, Any], words: str):
    tools = typed(**{key: kind(value) for key, value in arguments.items()})
    assume(not any(mark in json.dumps(arguments) for mark in ("</parameter>", "</arg_value>", "</tool_call>", "</think>")))
    found = split_calls(form.write(words, [ToolCall("f", json.dumps(arguments)), ToolCall("now", "{}")]), form, tools)
    assert not isinstance(found, Malformed), found
    said, calls = found
    assert (said.strip(), [call.name for call in calls]) == (words, ["f", "now"])
    assert json.loads(calls[0].arguments) == arguments


PIECES = [
    "<function=f>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
    "f",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "5",
    "\n",
]


@pytest.mark.parametrize("form", [TAGS, PAIRS])
@given(st.lists(st.sampled_from(PIECES), max_size=9))
def test_any_text_between_the_marks_is_read(form: CallForm, pieces: list[str]):
    """As a call that says the same once it is written and read again, or as none."""
    tools = typed(a={"type": "integer"})
    found = form.read("".join(pieces), tools)
    if isinstance(found, ToolCall):
        assert split_calls(form.write("", [found]), form, tools) == ("", (found,))


@pytest.mark.parametrize(
    ("told", "form"),
    [
        ("", None),
        ("tools: f", None),
        ("<tool_call><function=x></function></tool_call>", None),
        ("<tool_call>f<arg_key>k</arg_key></tool_call>", None),
        ("<tool_call>f(a=1)</tool_call>", None),
        (ASKS_FOR_JSON, JSON),
        ("<|tool_calls_begin|>f", None),
        (f"<tool_calls>[…]</tool_calls> and not {ASKS_FOR_JSON}", None),
    ],
)
def test_forms_that_are_not_known(told: str, form: CallForm | None):
    assert asked_for(told) is form


def test_a_template_that_refuses_tools_does_not_tell_of_them():
    template = QWEN_TOOLS.replace("{%- if tools %}", "{%- if tools %}{{- raise_exception('no tools') }}")
    renderer = ChatRenderer(tiny_tokenizer(template))
    assert renderer.call_form is JSON
    only = QWEN_TOOLS.replace("{%- if tools %}", "{%- if not tools %}{{- raise_exception('tools!') }}{%- endif %}{%- if tools %}")
    assert ChatRenderer(tiny_tokenizer(only)).call_form is JSON
    with pytest.raises(ModelError, match="does not tell a model of tools"):
        renderer.opening([Message("user", "x")], [ADD])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "message 1 calls add with arguments that are not valid JSON"),
        ("[1]", "message 1 calls add with arguments that are no JSON object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1e400}', "not valid JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
    ],
)
async def test_arguments_that_no_template_could_write_are_refused(arguments: str, reason: str):
    made = {"id": "x", "type": "function", "function": {"name": "add", "arguments": arguments}}
    tries = again(lambda first: [ASK, {"role": "assistant", "content": None, "tool_calls": [made]}, ASK])
    assert reason in str((await answered(tries, WRITTEN["tags"][0], template=TAG_TOOLS)).error)


async def test_arguments_of_any_depth_end_no_run():
    """What is still read at the endpoint may be too deep where it is written, which is further down the stack."""
    outcomes: set[str] = set()
    for depth in range(850, 985, 3):
        made = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": ' + "[" * depth + "]" * depth + "}"}}
        tries = again(lambda first, made=made: [ASK, {"role": "assistant", "content": None, "tool_calls": [made]}, ASK])
        error = str((await answered(tries, WRITTEN["tags"][0], template=TAG_TOOLS)).error)
        outcomes.add(next(known for known in ("nested too deeply", "not valid JSON", "None") if known in error))
    assert outcomes == {"nested too deeply", "not valid JSON", "None"}


async def test_no_arguments_may_be_an_empty_text():
    def emptied(first: Any) -> Any:
        (made,) = first["tool_calls"]
        return [ASK, {**first, "tool_calls": [{**made, "function": {"name": "now", "arguments": ""}}]}, result(first)]

    trajectory = await answered(again(emptied), WRITTEN["tags"][1], "7", template=TAG_TOOLS)
    assert (trajectory.info, trajectory.branches) == ({"second": "7"}, ())
