"""Groups and batches as Arrow IPC streams: the one form in which they are journaled and travel between processes.

A stream holds one record batch with one row for each sequence: a trajectory's own and then those of its branches, or a sample. Token arrays
are list columns, so decoding returns NumPy views into the buffer, which stay valid after every other reference to it is gone and are
read-only if the buffer is. Text and nested values are JSON, in the row or in the schema metadata. A tuple inside `info` or `fields` comes
back as a list, as JSON has no tuples.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from verst.errors import DataError, EnvironmentFailure, InvariantViolation, JournalError, VerstError
from verst.fields import Field, Opaque, packed, unpacked
from verst.types import Batch, Branch, FinishReason, Group, Message, Prompt, Routes, Sample, Status, Trajectory, Turn

GROUP_SCHEMA = "group/3"
BATCH_SCHEMA = "batch/3"
ROUTES_SCHEMA = "routes/1"
_READABLE = {GROUP_SCHEMA: ("group/1", "group/2")}
"""Older forms that are read as well: groups without fields and branches, and without branches."""

_SCHEMA_KEY = b"verst.schema"
_META_KEY = b"verst.meta"

# Masks are stored one byte a token: Arrow packs booleans into bits, which cannot be viewed as NumPy booleans.
_STORED = {
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.bool_): pa.uint8(),
    np.dtype(np.float32): pa.float32(),
}
_TOKEN_COLUMNS = {"tokens_T": np.int32, "loss_mask_T": np.bool_, "versions_T": np.int32}
_GROUP_COLUMNS = _TOKEN_COLUMNS | {"logprobs_T": np.float32}
_BATCH_COLUMNS = _TOKEN_COLUMNS | {"behaviour_logprobs_T": np.float32}


def _list_field(name: str, dtype: Any) -> pa.Field:
    return pa.field(name, pa.large_list(_STORED[np.dtype(dtype)]), nullable=False)


_GROUP_FIELDS = [
    pa.field("id", pa.large_utf8(), nullable=False),
    *(_list_field(name, dtype) for name, dtype in _GROUP_COLUMNS.items()),
    pa.field("reward", pa.float64()),
    pa.field("experts", pa.large_binary(), nullable=False),
    _list_field("per_token", np.float32),
    pa.field("branch", pa.int32(), nullable=False),
]
_BATCH_FIELDS = [
    pa.field("id", pa.large_utf8(), nullable=False),
    pa.field("group", pa.int64(), nullable=False),
    *(_list_field(name, dtype) for name, dtype in _BATCH_COLUMNS.items()),
    pa.field("reward", pa.float64(), nullable=False),
    _list_field("per_token", np.float32),
    pa.field("branch", pa.int32(), nullable=False),
]
_ROUTES_FIELDS = [
    pa.field("sample", pa.int64(), nullable=False),
    pa.field("experts", pa.large_binary(), nullable=False),
]


def encode_group(group: Group) -> bytes:
    """One group as an Arrow IPC stream.

    Raises `EnvironmentFailure` (a trajectory's `info`) or `DataError` (the prompt's `fields`) naming the key whose value is not JSON,
    `InvariantViolation` if a token array has another dtype than its carrier declares.
    """
    found = group.trajectories
    _check_json(group.prompt.fields, f"fields of prompt {group.prompt.id}", DataError)
    for trajectory in found:
        _check_json(trajectory.info, f"info of trajectory {trajectory.id}", EnvironmentFailure)
    rows = [one for trajectory in found for one in trajectory.sequences]
    owners = [trajectory for trajectory in found for _ in trajectory.sequences]
    ids = [owner.id for owner in owners]
    about, per_token = _pack_fields(ids, [row.fields if isinstance(row, Trajectory) else {} for row in rows])
    meta = {
        "seq": group.seq,
        "admitted_version": group.admitted_version,
        "timings": dict(group.timings),
        "cut": list(group.cut),
        "prompt": {
            "id": group.prompt.id,
            "messages": _pack_messages(group.prompt.messages),
            "fields": group.prompt.fields,
            "demonstration": _pack_messages(group.prompt.demonstration),
            "rejected": _pack_messages(group.prompt.rejected),
        },
        "details": [_pack_detail(row) for row in rows],
        "routes": [_pack_routes(row.routes) for row in rows],
        "fields": about,
    }
    columns = [
        pa.array(ids, pa.large_utf8()),
        *_token_columns(ids, rows, _GROUP_COLUMNS),
        pa.array([owner.reward for owner in owners], pa.float64()),
        _expert_column([row.routes for row in rows]),
        per_token,
        pa.array([branch for trajectory in found for branch in range(len(trajectory.sequences))], pa.int32()),
    ]
    return _write(GROUP_SCHEMA, _GROUP_FIELDS, columns, meta)


def decode_group(buffer: bytes | memoryview) -> Group:
    """The group in `buffer` (bytes, or a view of mapped or shared memory). Raises `JournalError` if it holds anything else."""
    table, meta = _read(buffer, GROUP_SCHEMA)
    ids, rewards = (table.column(name).to_pylist() for name in ("id", "reward"))
    arrays = _token_views(table, _GROUP_COLUMNS)
    routes = _route_views(table, meta["routes"])
    fields = _field_views(table, meta)

    def sequence(row: int) -> dict[str, Any]:
        """What trajectories and branches have alike."""
        detail = meta["details"][row]
        turns = tuple(Turn(start, generated, end, FinishReason(finish), text) for start, generated, end, finish, text in detail["turns"])
        own = {name: views[row] for name, views in arrays.items()}
        return own | {"routes": routes[row], "turns": turns, "messages": _unpack_messages(detail["messages"])}

    trajectories = tuple(
        Trajectory(
            id=ids[first],
            reward=rewards[first],
            fields=fields[first],
            branches=tuple(Branch(**sequence(row)) for row in range(first + 1, end)),
            **sequence(first),
            **_unpack_outcome(meta["details"][first]),
        )
        for first, end in itertools.pairwise([*_firsts(table), table.num_rows])
    )
    return Group(
        seq=meta["seq"],
        prompt=_unpack_prompt(meta["prompt"]),
        trajectories=trajectories,
        admitted_version=meta["admitted_version"],
        timings=meta["timings"],
        cut=tuple(meta.get("cut", ())),  # not in groups of before there was oversampling
    )


def encode_batch(batch: Batch) -> bytes:
    """One batch as an Arrow IPC stream, without its routes: see `encode_routes`.

    Raises `InvariantViolation` if a token array has another dtype than `Sample` declares.
    """
    rows = batch.samples
    ids = [row.id for row in rows]
    about, per_token = _pack_fields(ids, [row.fields for row in rows])
    columns = [
        pa.array(ids, pa.large_utf8()),
        pa.array([row.group for row in rows], pa.int64()),
        *_token_columns(ids, rows, _BATCH_COLUMNS),
        pa.array([row.reward for row in rows], pa.float64()),
        per_token,
        pa.array([row.branch for row in rows], pa.int32()),
    ]
    return _write(BATCH_SCHEMA, _BATCH_FIELDS, columns, {"step": batch.step, "groups": batch.groups, "fields": about})


def decode_batch(buffer: bytes | memoryview) -> Batch:
    """The batch in `buffer`. Raises `JournalError` if it holds anything else."""
    table, meta = _read(buffer, BATCH_SCHEMA)
    arrays: dict[str, Any] = _token_views(table, _BATCH_COLUMNS) | {"fields": _field_views(table, meta)}
    arrays |= {name: table.column(name).to_pylist() for name in ("id", "group", "reward", "branch")}
    samples = tuple(Sample(**{name: values[i] for name, values in arrays.items()}) for i in range(table.num_rows))
    return Batch(step=meta["step"], groups=tuple(meta["groups"]), samples=samples)


def encode_routes(routes: Mapping[int, Routes]) -> bytes:
    """Routes of samples, by their index in the batch, as an Arrow IPC stream."""
    columns = [pa.array(list(routes), pa.int64()), _expert_column(list(routes.values()))]
    return _write(ROUTES_SCHEMA, _ROUTES_FIELDS, columns, {"routes": [_pack_routes(found) for found in routes.values()]})


def decode_routes(buffer: bytes | memoryview) -> dict[int, Routes]:
    """The inverse of `encode_routes`, as views into the buffer. Raises `JournalError` if it holds anything else."""
    table, meta = _read(buffer, ROUTES_SCHEMA)
    found = zip(table.column("sample").to_pylist(), _route_views(table, meta["routes"]), strict=True)
    return {sample: routes for sample, routes in found if routes is not None}


def _expert_column(routes: Sequence[Routes | None]) -> pa.Array:
    return pa.array([b"" if found is None else found.experts_TLK.tobytes() for found in routes], pa.large_binary())


def _pack_routes(routes: Routes | None) -> list[Any] | None:
    return None if routes is None else [list(routes.experts_TLK.shape), routes.experts_TLK.dtype.name, routes.digest]


def _route_views(table: pa.RecordBatch, packed: Sequence[list[Any] | None]) -> list[Routes | None]:
    """NumPy views into the record batch, one a row."""
    views: list[Routes | None] = []
    for value, about in zip(table.column("experts"), packed, strict=True):
        if about is None:
            views.append(None)
        else:
            shape, dtype, digest = about
            experts: Any = np.ndarray(shape, dtype, value.as_buffer()) if math.prod(shape) else np.zeros(shape, dtype)
            views.append(Routes(experts, digest))
    return views


def _firsts(table: pa.RecordBatch) -> list[int]:
    """The row of each trajectory; those of its branches follow. In groups of before there were branches each row is one."""
    if "branch" not in table.schema.names:
        return list(range(table.num_rows))
    return [row for row, branch in enumerate(table.column("branch").to_pylist()) if branch == 0]


def _pack_fields(ids: Sequence[str], rows: Sequence[Mapping[str, Field]]) -> tuple[list[dict[str, Any]], pa.Array]:
    """Of each row what is JSON of its fields, and the column of all their `PerToken` end to end. `ids` are for messages."""
    for owner, fields in zip(ids, rows, strict=True):
        for name, value in fields.items():
            if isinstance(value, Opaque):
                _check_json(value.value, f"field {name!r} of {owner}", InvariantViolation)
    found = [packed(fields) for fields in rows]
    offsets = pa.array(np.cumsum([0, *(len(numbers) for _, numbers in found)], dtype=np.int64))
    numbers = np.concatenate([np.zeros(0, np.float32), *(numbers for _, numbers in found)])
    return [about for about, _ in found], pa.LargeListArray.from_arrays(offsets, pa.array(numbers))


def _field_views(table: pa.RecordBatch, meta: Mapping[str, Any]) -> list[dict[str, Field]]:
    """Fields of each row, the `PerToken` as views into the record batch; none in groups of before there were fields."""
    if "fields" not in meta:
        return [{} for _ in range(table.num_rows)]
    numbers = _token_views(table, {"per_token": np.float32})["per_token"]
    return [unpacked(about, values) for about, values in zip(meta["fields"], numbers, strict=True)]


def _pack_messages(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _unpack_prompt(packed: Mapping[str, Any]) -> Prompt:
    answers = (_unpack_messages(packed.get(name, ())) for name in ("demonstration", "rejected"))  # earlier groups have no pairs
    return Prompt(packed["id"], _unpack_messages(packed["messages"]), packed["fields"], *answers)


def _unpack_messages(packed: Sequence[Sequence[str]]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in packed)


def _pack_detail(row: Trajectory | Branch) -> dict[str, Any]:
    detail = {
        "turns": [[turn.start, turn.generated, turn.end, turn.finish, turn.text] for turn in row.turns],
        "messages": _pack_messages(row.messages),
    }
    if isinstance(row, Branch):
        return detail
    return detail | {"status": row.status, "seed": row.seed, "error": row.error, "info": row.info}


def _unpack_outcome(detail: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": Status(detail["status"]), "seed": detail["seed"], "error": detail["error"], "info": detail["info"]}


def _token_columns(ids: Sequence[str], rows: Sequence[Any], columns: Mapping[str, Any]) -> list[pa.Array]:
    """A list column for each array attribute of the rows, which all have the same lengths. `ids` are for messages."""
    lengths = [len(row.tokens_T) for row in rows]
    offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int64))
    packed = []
    for name, declared in columns.items():
        dtype = np.dtype(declared)
        arrays = [getattr(row, name) for row in rows]
        for owner, array, length in zip(ids, arrays, lengths, strict=True):
            if array.dtype != dtype or array.shape != (length,):
                raise InvariantViolation(f"{owner}: {name} is {array.dtype}{list(array.shape)}, it must be {dtype}[{length}]")
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
        stored = values.view(np.uint8) if dtype == np.bool_ else values
        packed.append(pa.LargeListArray.from_arrays(offsets, pa.array(stored)))
    return packed


def _token_views(table: pa.RecordBatch, columns: Mapping[str, Any]) -> dict[str, list[NDArray[Any]]]:
    """NumPy views into the record batch: for each column, one array a row."""
    views = {}
    for name, dtype in columns.items():
        column = table.column(name)
        offsets = column.offsets.to_pylist()
        values = column.values.to_numpy(zero_copy_only=True).view(dtype)
        views[name] = [values[start:end] for start, end in itertools.pairwise(offsets)]
    return views


def _write(schema: str, fields: list[pa.Field], columns: list[pa.Array], meta: Mapping[str, Any]) -> bytes:
    arrow_schema = pa.schema(fields, {_SCHEMA_KEY: schema.encode(), _META_KEY: _to_json(meta)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, arrow_schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=arrow_schema))
    return sink.getvalue().to_pybytes()


def _read(buffer: bytes | memoryview, schema: str) -> tuple[pa.RecordBatch, dict[str, Any]]:
    source = pa.py_buffer(buffer)
    if source.address % 8:  # NumPy views of misaligned columns would be slow everywhere and refused by torch
        source = pa.py_buffer(source.to_pybytes())
    try:
        table = pa.ipc.open_stream(source).read_next_batch()
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise JournalError(f"a record of {source.size} bytes is not a {schema!r} Arrow stream: {error}") from error
    metadata = table.schema.metadata or {}
    found = metadata.get(_SCHEMA_KEY, b"none").decode()
    if found not in (schema, *_READABLE.get(schema, ())):
        raise JournalError(f"a record has schema {found!r} where {schema!r} is needed: it was written by another version of Verst")
    return table, _from_json(metadata[_META_KEY])


def _to_json(value: Any) -> bytes:
    # surrogatepass: a prompt file may hold lone surrogates as escapes, and they must come back as they were.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=dict)  # dict: for mappings of other types
    return text.encode("utf-8", "surrogatepass")


def _from_json(packed: bytes) -> Any:
    return json.loads(packed.decode("utf-8", "surrogatepass"))


def _check_json(value: Any, where: str, error: type[VerstError]) -> None:
    """Refuses what `json` would reject without naming it (NaN, objects) or change in silence (keys that are not text)."""
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise error(f"{where} is {value}, which JSON cannot hold: use None or leave it out")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise error(f"{where} has the key {key!r} of type {type(key).__name__}: JSON keys are text")
            _check_json(item, f"{where}[{key!r}]", error)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]", error)
    else:
        raise error(f"{where} is a {type(value).__name__}, which is not a JSON value: convert it to text, numbers, lists or dicts")
