"""Where prompts come from: files, Python rows and generated tasks, all as blocks of rows that are read one block at a time.

A block is what a source can read without reading what is before it. Whoever shuffles, shuffles blocks first and then the rows of a few
blocks held together (`verst.data.stream`), so that no source is ever read whole to yield its first prompt.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from verst.config.schema import DataConfig
from verst.errors import ConfigError, DataError, first_line
from verst.extend import guarded

WINDOW_BYTES = 16 * 2**20
"""Raw data that is shuffled together: the memory a stream holds, times what Python objects add."""

_BLOCK_BYTES = 256 * 2**10
_BLOCK_ROWS = 256
_WINDOW_ROWS = 16384
_END = object()


@dataclass(frozen=True, slots=True)
class Row:
    """One row, parsed (or generated) only when it is asked for. `locate` says where it is, for error messages."""

    id: str  # stable: "FILE:BYTE", "FILE:ROW", "TASK:INDEX", "rows:INDEX"
    load: Callable[[], Mapping[str, Any]]
    locate: Callable[[], str]


class Source(Protocol):
    """Rows in blocks.

    `num_blocks` None means unknown: blocks are then read in order from 0, without shuffling. `unlimited` sources generate: a pass over
    them never ends. `window_blocks` are shuffled together. `rereadable` is False for a one-shot iterator.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_blocks(self) -> int | None: ...

    @property
    def window_blocks(self) -> int: ...

    @property
    def unlimited(self) -> bool: ...

    @property
    def rereadable(self) -> bool: ...

    def read_block(self, block: int) -> Sequence[Row] | None:
        """The rows of one block, possibly none. None (only where `num_blocks` is) says that the source ended before this block."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values that differ when the source would yield other rows: a stream refuses to resume on them."""
        ...


class JsonlSource:
    """Lines of JSON objects. A block is a fixed range of bytes; a line belongs to the block in which it starts. Blank lines are skipped."""

    unlimited = False
    rereadable = True

    def __init__(self, path: Path, block_bytes: int = _BLOCK_BYTES, window_bytes: int = WINDOW_BYTES) -> None:
        self.name = path.name
        self.path = path
        self.size_bytes = path.stat().st_size
        self.num_blocks = math.ceil(self.size_bytes / block_bytes)
        self.window_blocks = max(1, window_bytes // block_bytes)
        self._block_bytes = block_bytes

    def read_block(self, block: int) -> Sequence[Row]:
        start, end = block * self._block_bytes, min((block + 1) * self._block_bytes, self.size_bytes)
        rows: list[Row] = []
        with self.path.open("rb") as file:
            if start:
                # A line starts here only if the byte before is a newline; otherwise the first newline inside the block precedes one.
                file.seek(start - 1)
                if not file.readline(end - start + 1).endswith(b"\n"):
                    return rows
            while (offset := file.tell()) < end:
                line = file.readline()
                if line.strip():
                    rows.append(Row(f"{self.name}:{offset}", partial(self._parse, offset, line), partial(self._locate, offset)))
        return rows

    def fingerprint(self) -> Mapping[str, Any]:
        return {"jsonl": self.name, "bytes": self.size_bytes}

    def _parse(self, offset: int, line: bytes) -> Mapping[str, Any]:
        try:
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8")  # some editors put a byte order mark before the first line
            value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._locate(offset)}: byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._locate(offset)}: not JSON: {error}. Each line must hold one whole JSON object") from error
        if not isinstance(value, dict):
            raise DataError(f'{self._locate(offset)}: a JSON {_kind(value)}; each line must hold one JSON object, as in {{"prompt": "…"}}')
        return value

    def _locate(self, offset: int) -> str:
        # Counting lines reads the file, so it is done only once something is wrong.
        line, left = 1, offset
        with self.path.open("rb") as file:
            while left and (chunk := file.read(min(left, 2**20))):
                line += chunk.count(b"\n")
                left -= len(chunk)
        return f"{self.path}, line {line}"


class ParquetSource:
    """Rows of a Parquet file. A block is a row group, read whole: the file's writer decided how large that is."""

    unlimited = False
    rereadable = True

    def __init__(self, path: Path, window_bytes: int = WINDOW_BYTES) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = path.name
        self.path = path
        self._errors = (pa.ArrowException, OSError)
        try:
            self._file = pq.ParquetFile(path)
        except self._errors as error:
            raise DataError(
                f"{path} is not a readable Parquet file ({first_line(error)}): truncated, or of another format; copy or write it again"
            ) from error
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self._first_rows = [0, *np.cumsum([group.num_rows for group in groups]).tolist()]
        self.num_blocks = len(groups)
        largest = max((group.total_byte_size for group in groups), default=1)
        self.window_blocks = max(1, window_bytes // max(1, largest))

    def read_block(self, block: int) -> Sequence[Row]:
        try:
            table = self._file.read_row_group(block)
        except self._errors as error:
            raise DataError(f"{self.path}, row group {block} cannot be read ({first_line(error)}): write the file again") from error
        first = self._first_rows[block]
        return [
            Row(f"{self.name}:{first + i}", partial(self._convert, table, i, first + i), partial(self._locate, first + i))
            for i in range(table.num_rows)
        ]

    def fingerprint(self) -> Mapping[str, Any]:
        return {"parquet": self.name, "rows": self._first_rows[-1], "row_groups": self.num_blocks}

    def _convert(self, table: Any, index: int, row: int) -> Mapping[str, Any]:
        values = table.slice(index, 1).to_pylist(maps_as_pydicts="strict")[0]
        return {name: json_value(value, f"{self._locate(row)}, column {name!r}") for name, value in values.items()}

    def _locate(self, row: int) -> str:
        return f"{self.path}, row {row}"


class SequenceSource:
    """Rows of a Python sequence (`len` and indexing): mappings, or texts that are prompts. A block is a run of rows."""

    unlimited = False
    rereadable = True
    name = "rows"

    def __init__(self, rows: Any, text_column: str, block_rows: int = _BLOCK_ROWS) -> None:
        if not len(rows):
            raise DataError("rows is empty: give at least one prompt")
        self.num_blocks = math.ceil(len(rows) / block_rows)
        self.window_blocks = max(1, _WINDOW_ROWS // block_rows)
        self._rows, self._text_column, self._block_rows = rows, text_column, block_rows

    def read_block(self, block: int) -> Sequence[Row]:
        first = block * self._block_rows
        return [self._row(i) for i in range(first, min(first + self._block_rows, len(self._rows)))]

    def fingerprint(self) -> Mapping[str, Any]:
        return {"rows": len(self._rows)}

    def _row(self, index: int) -> Row:
        def load() -> Mapping[str, Any]:
            value = guarded(lambda: self._rows[index], _locate_row(index), DataError)
            return _python_row(value, self._text_column, index)

        return Row(f"rows:{index}", load, partial(_locate_row, index))


class IterableSource:
    """Rows of a Python iterable, taken one at a time, only when needed, in their own order: there is no shuffling.

    An iterable that makes a new iterator each time is repeated, and must then yield the same rows again. A one-shot iterator (a
    generator) is read once: its end ends the run, and a resumed run skips as many rows of a fresh one as were consumed.
    """

    unlimited = False
    num_blocks = None
    window_blocks = 1
    name = "rows"

    def __init__(self, rows: Iterable[Any], text_column: str) -> None:
        self._rows, self._text_column = rows, text_column
        self._iterator: Iterator[Any] = iter(rows)
        self._next = 0
        self.rereadable = self._iterator is not rows

    def read_block(self, block: int) -> Sequence[Row] | None:
        if block < self._next:
            self._rewind()
        while (value := guarded(partial(next, self._iterator, _END), _locate_row(self._next), DataError)) is not _END:
            index = self._next
            self._next += 1
            if index == block:
                return [Row(f"rows:{index}", partial(_python_row, value, self._text_column, index), partial(_locate_row, index))]
        return None

    def fingerprint(self) -> Mapping[str, Any]:
        return {"rows": "iterable"}

    def _rewind(self) -> None:
        if not self.rereadable:
            raise DataError(
                f"rows is a one-shot iterator that gave {self._next} rows and cannot start again: give a list, or an object whose "
                "__iter__ makes a new iterator each time"
            )
        self._iterator, self._next = iter(self._rows), 0


def open_source(data: DataConfig, rows: Any = None) -> Source:
    """The source a run file names, or `rows` given from Python: a sequence or iterable of mappings or texts.

    Raises `ConfigError` unless exactly one of `data.path`, `data.dataset`, `data.task` and `rows` is given, and `DataError` if it cannot
    be opened.
    """
    named = {"data.path": data.path, "data.dataset": data.dataset, "data.task": data.task, "rows": rows}
    given = [name for name, value in named.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"{' and '.join(given) or 'no source of prompts'} given: set exactly one of {', '.join(named)}")
    if data.path is not None:
        return _open_file(Path(data.path))
    if data.dataset is not None:
        from verst.data.datasets import DatasetSource

        return DatasetSource(data.dataset, data.options)
    if data.task is not None:
        from verst.data.tasks import TaskSource

        return TaskSource(data.task, data.options)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"rows is a {type(rows).__name__}: give a list or iterable of mappings, or of prompt texts")
    text_column = data.columns.get("prompt", "prompt")
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return SequenceSource(rows, text_column)
    return IterableSource(rows, text_column)


def json_value(value: Any, where: str) -> Any:
    """`value` in JSON types. Dates become ISO 8601 text, decimals text, durations seconds, NaN (a missing value in pandas) null.

    Raises `DataError` naming `where` for what JSON cannot hold.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise DataError(f"{where} is {value}, which JSON cannot hold: use a finite number or null")
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): json_value(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, where) for item in value]
    if isinstance(value, date | time):  # datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    raise DataError(f"{where} holds {type(value).__name__}, which JSON cannot hold: drop the column or write it as text")


def nearest(name: str, names: Iterable[str]) -> str:
    """What to append to an error message about an unknown name: the known ones that resemble it, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def _open_file(path: Path) -> Source:
    if not os.path.isfile(path):
        reason = "is a directory, not a file" if os.path.isdir(path) else f"does not exist (the current directory is {Path.cwd()})"
        raise DataError(f"data.path {path} {reason}: give a .jsonl or .parquet file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"data.path {path} cannot be read ({error.strerror}): give this user the right to read it") from error
    kinds: Mapping[str, Callable[[Path], Source]] = {".jsonl": JsonlSource, ".parquet": ParquetSource}
    if path.suffix not in kinds:
        raise DataError(f"data.path {path} ends in {path.suffix!r}: give an uncompressed .jsonl or a .parquet file")
    if not path.stat().st_size:
        raise DataError(f"data.path {path} is empty: it has 0 bytes; give a file with at least one prompt")
    return kinds[path.suffix](path)


def _locate_row(index: int) -> str:
    return f"rows[{index}]"


def _python_row(value: Any, text_column: str, index: int) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {text_column: value}
    if not isinstance(value, Mapping):
        raise DataError(f"rows[{index}] is a {type(value).__name__}: give a mapping with the column {text_column!r}, or the prompt's text")
    return {str(name): json_value(item, f"rows[{index}], column {name!r}") for name, item in value.items()}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; write null")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the largest number; write a smaller one, or text")
    return value


def _kind(value: Any) -> str:
    names = {list: "array", str: "text", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
