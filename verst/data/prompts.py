"""From a row to a `Prompt`, and the hash that decides on which side of the holdout split a prompt lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from verst.config.schema import DataConfig
from verst.data.sources import Row, nearest
from verst.errors import DataError
from verst.types import Message, Prompt


def to_prompt(row: Row, data: DataConfig) -> Prompt:
    """The row's prompt column as messages, `data.system` before them; its other columns are the prompt's fields.

    Raises `DataError` naming the row if a column is missing or is neither text nor messages.
    """
    values = row.load()
    messages = _messages(values, data.prompt_column, "data.prompt_column", "user", row)
    taken = {data.prompt_column}
    demonstration: tuple[Message, ...] = ()
    if data.demonstration_column is not None:
        demonstration = _messages(values, data.demonstration_column, "data.demonstration_column", "assistant", row)
        taken.add(data.demonstration_column)
    if data.system is not None:
        messages = (Message("system", data.system), *messages)
    fields = {name: value for name, value in values.items() if name not in taken}
    return Prompt(row.id, messages, fields, demonstration)


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


def _messages(values: Mapping[str, Any], column: str, key: str, role: str, row: Row) -> tuple[Message, ...]:
    if column not in values:
        raise DataError(
            f"{row.locate()} has no column {column!r}{nearest(column, values)}; its columns: {', '.join(values) or 'none'}. Set {key}"
        )
    value = values[column]
    if isinstance(value, str):
        return (Message(role, value),)
    if not isinstance(value, Sequence) or not value:
        shown = "an empty list" if isinstance(value, Sequence) else "null" if value is None else type(value).__name__
        raise DataError(f"{row.locate()}: column {column!r} is {shown}; it must be text or a list of {{role, content}}")
    return tuple(_message(item, f"{row.locate()}: column {column!r}, message {i}") for i, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where} must be {{role, content}}, both text, and is {json.dumps(item, ensure_ascii=False)[:80]}")
    return Message(role, content)
