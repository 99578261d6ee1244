"""OpenAI's chat completions as data: requests read and checked, answers written whole and in chunks.

What a session cannot do is refused with the reason and never guessed.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.config.text import is_unicode
from verst.data.call_forms import ToolCall, Tools, no_constant
from verst.rollout.sessions import Answer, Said
from verst.types import FinishReason

_REFUSED = ("functions", "function_call", "logprobs", "top_logprobs", "logit_bias", "audio", "prediction")
_NOT_HEEDED = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "reasoning_effort",
)
_MOST_CHOICES = 128  # as OpenAI's
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a session is asked.

    Args:
        calls: whether calls of tools are taken out of the answers' text.
        choices: how many answers are wanted.
        usage: whether a stream ends with the numbers of tokens.
    """

    messages: tuple[Said, ...]
    tools: Tools
    calls: bool
    choices: int
    usage: bool
    not_heeded: frozenset[str]


def checked(body: Any) -> ChatRequest:
    """The request in a body. Raises `ValueError` with the reason where it cannot be answered."""
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ValueError("the body must be a JSON object with a list of messages")
    choices = body.get("n") or 1
    if not isinstance(choices, int) or not 1 <= choices <= _MOST_CHOICES:
        raise ValueError(f"n must be a whole number from 1 to {_MOST_CHOICES}")
    refused = [name for name in _REFUSED if body.get(name)]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not supported by a session")
    form = body.get("response_format") or {}
    if not isinstance(form, Mapping) or form.get("type", "text") != "text":
        raise ValueError("response_format: a session answers with text only")
    choice = body.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise ValueError("tool_choice must be auto or none: nothing makes the policy call a tool")
    streamed = body.get("stream_options") or {}
    if not isinstance(streamed, Mapping):
        raise ValueError("stream_options must be an object")
    not_heeded = {name for name in _NOT_HEEDED if body.get(name) is not None}
    if body.get("parallel_tool_calls") is False:
        not_heeded.add("parallel_tool_calls")
    messages = tuple(_said(number, message) for number, message in enumerate(body["messages"]))
    usage = bool(streamed.get("include_usage"))
    return ChatRequest(messages, _tools(body.get("tools") or []), choice == "auto", choices, usage, frozenset(not_heeded))


def _tools(tools: Any) -> Tools:
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} must be of the type function, with a function that has a name")
    return tuple(tools)


def _said(number: int, message: Any) -> Said:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with a role")
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if isinstance(content, list):
        content = _text(number, content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text: content must be a string, or parts of the type text")
    return Said(message["role"], content, _calls(number, calls))


def _calls(number: int, calls: Any) -> tuple[tuple[str, ToolCall], ...]:
    try:
        found = tuple((call["id"], ToolCall(call["function"]["name"], call["function"]["arguments"])) for call in calls)
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"message {number} has tool_calls that are none: each has an id, and a function with name and arguments"
        ) from error
    if not all(isinstance(text, str) for identity, call in found for text in (identity, call.name, call.arguments)):
        raise ValueError(f"message {number} has tool_calls whose id, name or arguments are no text")
    return tuple((identity, ToolCall(call.name, _object(number, call))) for identity, call in found)


def _object(number: int, call: ToolCall) -> str:
    """The arguments of a call. Some clients send an empty text for none."""
    text = call.arguments or "{}"
    where = f"message {number} calls {call.name[:80]} with arguments that"
    try:
        found = json.loads(text, parse_constant=no_constant)
        known = json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} are not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} are no JSON object: {text[:80]}")
    if not is_unicode(known):  # as an escape, which a template would write as the half itself
        raise ValueError(f"{where} have half of a surrogate pair, which no tokenizer takes")
    return text


def _text(number: int, parts: Sequence[Any]) -> str:
    if not all(isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"message {number} has parts that are no text: the policy reads text only")
    return "".join(part["text"] for part in parts)


def whole(answers: Sequence[Answer], described: Mapping[str, Any]) -> dict[str, Any]:
    """A `chat.completion` object."""
    choices = [
        {"index": number, "message": _message(answer.said), "logprobs": None, "finish_reason": _finish(answer)}
        for number, answer in enumerate(answers)
    ]
    return {**described, "object": "chat.completion", "choices": choices, "usage": _usage(answers)}


def chunks(answers: Sequence[Answer], described: Mapping[str, Any], *, usage: bool) -> Iterator[dict[str, Any]]:
    """Two `chat.completion.chunk` objects for each: all that was said, and its end. It was whole before the first could be sent.

    `usage`: a last one has the numbers of tokens, and no choices.
    """
    about = {**described, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    for number, answer in enumerate(answers):
        delta = _message(answer.said)
        if answer.said.calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(delta["tool_calls"])]
        for part, finish in ((delta, None), ({}, _finish(answer))):
            choice = {"index": number, "delta": part, "logprobs": None, "finish_reason": finish}
            yield {**about, "choices": [choice]}
    if usage:
        yield {**about, "choices": [], "usage": _usage(answers)}


def _message(said: Said) -> dict[str, Any]:
    if not said.calls:
        return {"role": "assistant", "content": said.content}
    calls = [
        {"id": identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for identity, call in said.calls
    ]
    return {"role": "assistant", "content": said.content or None, "tool_calls": calls}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Numbers of tokens; those of the prompt once, however many choices it has."""
    prompt, completion = answers[0].prompt_tokens, sum(len(answer.completion.tokens) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _finish(answer: Answer) -> str:
    finish = _FINISH.get(answer.completion.finish, "stop")
    return "tool_calls" if answer.said.calls and finish == "stop" else finish
