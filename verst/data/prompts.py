"""From a row to a `Prompt`, and the hash that decides on which side of the holdout split a prompt lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.config.checks import PAIR
from verst.config.schema import DataConfig
from verst.data.sources import Row, nearest
from verst.errors import DataError
from verst.types import Message, Prompt

_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""


def to_prompt(row: Row, data: DataConfig) -> Prompt:
    """The row's columns under the names that `data.columns` gives them: prompt, demonstration or pair, fields; first comes `data.system`.

    Messages may have the forms of TRL's conversational data sets and of ShareGPT (`from` and `value`); contents may be lists of text parts.

    Raises `DataError` naming the row if a column is missing or is neither text nor messages.
    """
    values = row.load()
    names = _names(values, data, row)
    taken = set(names.values())
    columns = {name: _Column(name, value) for name, value in values.items() if name not in taken}
    columns |= {name: _Column(column, values[column]) for name, column in names.items()}
    demonstration: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    if names.keys() >= PAIR:
        messages, demonstration, rejected = _pair(columns.pop("prompt", None), columns.pop("chosen"), columns.pop("rejected"), row)
    elif "messages" in names:
        messages, demonstration = _cut(_messages(columns.pop("messages"), "user", row), row)
    else:
        messages = _messages(columns.pop("prompt"), "user", row)
        if "demonstration" in names and (given := columns.pop("demonstration")).value is not None:
            demonstration = _messages(given, "assistant", row)
    if data.system is not None:
        messages = (Message("system", data.system), *messages)
    return Prompt(row.id, messages, {name: column.value for name, column in columns.items()}, demonstration, rejected)


def split_point(prompt: Prompt, data: DataConfig) -> float:
    """A number in [0, 1), fixed by the prompt's text alone; below `data.holdout` the prompt is held out.

    `data.system` does not count, so that a new system message leaves the split as it is.
    """
    return int.from_bytes(bytes.fromhex(text_hash(prompt, data)), "big") / 2**64


def text_hash(prompt: Prompt, data: DataConfig) -> str:
    """16 hexadecimal digits of the prompt's messages, `data.system` left out: equal for equal tasks, whatever their row."""
    given = prompt.messages if data.system is None else prompt.messages[1:]
    text = json.dumps([[message.role, message.content] for message in given], ensure_ascii=False)
    # surrogatepass: JSON may hold a lone surrogate, which plain UTF-8 refuses.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class _Column:
    name: str  # the data's own
    value: Any


def _names(values: Mapping[str, Any], data: DataConfig, row: Row) -> dict[str, str]:
    """The data's names of `prompt` (and `demonstration`) or `messages`, and of what else has another one."""
    names = dict(data.columns)
    if names.keys() >= PAIR:
        if "prompt" in values:
            names.setdefault("prompt", "prompt")
    elif "prompt" not in names and "messages" not in names:
        name = "messages" if "prompt" not in values and "messages" in values else "prompt"
        names[name] = name
    if "prompt" in names and "demonstration" in values:
        names.setdefault("demonstration", "demonstration")
    for name, column in names.items():
        if column not in values:
            there = f"{nearest(column, values)}; its columns: {', '.join(values) or 'none'}"
            raise DataError(f"{row.locate()} has no column {column!r}{there}. Set data.columns, as in {{{name}: COLUMN}}")
    return names


def _cut(conversation: tuple[Message, ...], row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages before the first answer, and those from there on."""
    first = next((i for i, message in enumerate(conversation) if message.role == "assistant"), len(conversation))
    if first == 0:
        raise DataError(f"{row.locate()}: the conversation begins with an answer: there is no prompt before it")
    return conversation[:first], conversation[first:]


_Messages = tuple[Message, ...]


def _pair(prompt: _Column | None, chosen: _Column, rejected: _Column, row: Row) -> tuple[_Messages, _Messages, _Messages]:
    """Prompt, better and worse answer, in TRL's forms: answers beside a prompt, or whole texts or conversations that begin alike."""
    better, worse = (_messages(column, "assistant", row) for column in (chosen, rejected))
    common: _Messages = ()
    if better[0].role != "assistant":  # whole conversations; a prompt beside them repeats their beginning
        same = same_beginning(better, worse)
        common, better, worse = better[:same], better[same:], worse[same:]
    elif prompt is not None:
        common = _messages(prompt, "user", row)
    elif isinstance(chosen.value, str) and isinstance(rejected.value, str):
        same = same_beginning(chosen.value, rejected.value)
        same -= chosen.value[:same].endswith(" ")  # a space before the answers belongs to them, as in TRL
        common = (Message("user", chosen.value[:same]),)
        better, worse = ((Message("assistant", text[same:]),) for text in (chosen.value, rejected.value))
    begun = bool(common) and bool(common[-1].content)
    if not begun or any(not answer or answer[0].role != "assistant" for answer in (better, worse)):
        raise DataError(
            f"{row.locate()}: columns {chosen.name!r} and {rejected.name!r} must be two answers to the prompt or, without one, two whole "
            "texts or conversations that begin alike and differ from an answer on"
        )
    if better == worse:
        raise DataError(f"{row.locate()}: columns {chosen.name!r} and {rejected.name!r} are the same answer: there is nothing to prefer")
    return common, better, worse


def same_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many characters, messages or tokens are the same at the beginning of both."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _messages(column: _Column, role: str, row: Row) -> tuple[Message, ...]:
    value = column.value
    if isinstance(value, str):
        return (Message(role, value),)
    where = f"column {column.name!r}"
    if not isinstance(value, Sequence) or not value:
        shown = "an empty list" if isinstance(value, Sequence) else "null" if value is None else type(value).__name__
        raise DataError(f"{row.locate()}: {where} is {shown}; it must be text or a list of {{role, content}}")
    return tuple(_message(item, f"{where}, message {i}", row) for i, item in enumerate(value))


def _message(item: Any, where: str, row: Row) -> Message:
    if not isinstance(item, Mapping):
        item = {"": item}
    role = item.get("role", _SPEAKERS.get(str(item.get("from")), item.get("from")))
    if item.get("tool_calls"):
        raise DataError(
            f"{row.locate()}: {where} has tool_calls, which Verst does not render: write the call into the content, or leave the row out"
        )
    content = _text(item.get("content", item.get("value")))
    if not isinstance(role, str) or content is None:
        shown = json.dumps(item.get("", item), ensure_ascii=False, default=str)[:80]
        raise DataError(f"{row.locate()}: {where} must be {{role, content}}, both text, and is {shown}")
    return Message(role, content)


def _text(content: Any) -> str | None:
    """Text as it is, or the texts of a list of parts. None for all else, images among it."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content if isinstance(content, str) else None
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in content]
    return "".join(text for text in texts if isinstance(text, str)) if texts and None not in texts else None
