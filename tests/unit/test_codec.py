import gc
import json
import types
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.errors import DataError, EnvironmentFailure, InvariantViolation, JournalError
from verst.journal.codec import decode_batch, decode_group, encode_batch, encode_group
from verst.types import Batch, Branch, FinishReason, Group, Message, Prompt, Routes, Sample, Status, Trajectory, Turn


def assert_same(left: Any, right: Any) -> None:
    """Equality to the bit, types included: dataclasses field by field, arrays by dtype and bytes, NaN equal to itself."""
    assert type(left) is type(right)
    if is_dataclass(left):
        for item in fields(left):
            assert_same(getattr(left, item.name), getattr(right, item.name))
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key])
    else:
        assert left == right or (left != left and right != right)


def trajectory(name: str = "0/0", tokens: int = 5, **changes: Any) -> Trajectory:
    rng = np.random.default_rng(tokens)
    values: dict[str, Any] = {
        "id": name,
        "tokens_T": rng.integers(0, 50_000, tokens, dtype=np.int32),
        "loss_mask_T": np.arange(tokens) >= tokens // 2,
        "logprobs_T": -rng.random(tokens, dtype=np.float32),
        "versions_T": np.full(tokens, 3, np.int32),
        "turns": (Turn(0, tokens // 2, tokens, FinishReason.STOP, "text"),),
        "messages": (Message("user", "question"),),
        "status": Status.FINISHED,
        "seed": 17,
        "reward": 0.5,
        "info": {},
    }
    return Trajectory(**(values | changes))


def group_of(*rows: Trajectory, **prompt: Any) -> Group:
    return Group(4, Prompt("file:4", (Message("user", "question"),), **prompt), rows, 2, {"roll_s": 0.1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_dicts = st.dictionaries(st.text(), json_values, max_size=3)
any_text = st.text(st.characters(), max_size=12)  # lone surrogates included
messages = st.lists(st.builds(Message, any_text, any_text), max_size=3).map(tuple)
turns = st.builds(Turn, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.sampled_from(FinishReason), any_text)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    tokens = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = rng.integers(0, 2**32, tokens, dtype=np.uint32)  # any float32, every NaN included
    return (
        rng.integers(-(2**31), 2**31, tokens, dtype=np.int32),
        rng.random(tokens) < 0.5,
        bits.view(np.float32),
        rng.integers(-1, 9, 2 * tokens, dtype=np.int32)[::2],  # not contiguous
    )


some_routes = st.builds(
    lambda shape, dtype, seed, digest: Routes(np.random.default_rng(seed).integers(0, 100, shape).astype(dtype), digest),
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 4)),
    st.sampled_from([np.uint8, np.int16]),
    st.integers(0, 99),
    st.text(max_size=16),
)


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    said = tuple(draw(st.lists(turns, max_size=2)))
    return Branch(*draw(arrays()), turns=said, messages=draw(messages), routes=draw(st.none() | some_routes))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    return Trajectory(
        draw(st.text()),
        *draw(arrays()),
        turns=tuple(draw(st.lists(turns, max_size=2))),
        messages=draw(messages),
        status=draw(st.sampled_from(Status)),
        seed=draw(st.integers(0, 2**70)),
        error=draw(st.none() | any_text),
        reward=draw(st.none() | st.floats()),
        info=draw(json_dicts),
        routes=draw(st.none() | some_routes),
        branches=tuple(draw(st.lists(branches(), max_size=2))),
    )


prompts = st.builds(Prompt, any_text, messages, json_dicts, messages)
groups = st.builds(
    Group,
    st.integers(0, 2**40),
    prompts,
    st.lists(trajectories(), max_size=4).map(tuple),
    st.integers(-1, 99),
    st.dictionaries(st.text(), st.floats(), max_size=2),
)


@given(groups)
@settings(max_examples=60, deadline=None)
def test_any_group_comes_back_to_the_bit(group: Group) -> None:
    assert_same(decode_group(encode_group(group)), group)


@given(
    st.lists(st.tuples(st.text(), st.integers(-(2**63), 2**63 - 1), arrays(), st.floats(), st.integers(0, 9)), max_size=4),
    st.lists(st.integers(0, 2**40), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_batch_comes_back_to_the_bit(rows: list[tuple[Any, ...]], seqs: list[int]) -> None:
    samples = tuple(Sample(name, group, *tokens, reward=reward, branch=branch) for name, group, tokens, reward, branch in rows)
    batch = Batch(7, tuple(seqs), samples)
    assert_same(decode_batch(encode_batch(batch)), batch)


def test_decoded_arrays_are_views_of_the_buffer_and_outlive_it():
    group = group_of(trajectory(tokens=64), trajectory("0/1", tokens=3))
    encoded = encode_group(group)
    raw = np.frombuffer(encoded, np.uint8)
    start, end = raw.ctypes.data, raw.ctypes.data + raw.nbytes
    decoded = decode_group(encoded)
    arrays = [array for row in decoded.trajectories for array in (row.tokens_T, row.loss_mask_T, row.logprobs_T, row.versions_T)]
    assert all(start <= array.ctypes.data < end for array in arrays)
    assert not any(array.flags.writeable for array in arrays)
    tokens_T = decoded.trajectories[0].tokens_T
    del raw, encoded, decoded, arrays
    gc.collect()
    assert tokens_T.tolist() == group.trajectories[0].tokens_T.tolist()


def test_a_misaligned_buffer_gives_aligned_arrays():
    group = group_of(trajectory(tokens=33))
    shifted = memoryview(b"\0" + encode_group(group))[1:]
    decoded = decode_group(shifted)
    assert_same(decoded, group)
    assert decoded.trajectories[0].tokens_T.flags.aligned


def test_the_stream_is_plain_arrow_that_any_reader_opens():
    row = trajectory(tokens=6)
    table = pa.ipc.open_stream(encode_group(group_of(row))).read_all()
    assert table.num_rows == 1
    assert table.column("tokens_T").to_pylist() == [row.tokens_T.tolist()]
    assert table.column("reward").to_pylist() == [0.5]
    assert json.loads(table.schema.metadata[b"verst.meta"])["prompt"]["id"] == "file:4"


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({"score": {"parts": [1, {2, 3}]}}, r"info of trajectory 4/1\['score'\]\['parts'\]\[1\] is a set"),
        ({"loss": np.float32(1)}, r"\['loss'\] is a float32"),
        ({"x": float("nan")}, r"\['x'\] is nan"),
        ({"by_id": {3: "three"}}, r"\['by_id'\] has the key 3 of type int"),
    ],
)
def test_a_value_that_is_not_json_is_named(info: dict[str, Any], named: str) -> None:
    with pytest.raises(EnvironmentFailure, match=named):
        encode_group(group_of(trajectory("4/0"), trajectory("4/1", info=info)))


def test_a_prompt_field_that_is_not_json_is_named():
    with pytest.raises(DataError, match=r"fields of prompt file:4\['answer'\] is a object"):
        encode_group(group_of(trajectory(), fields={"answer": object()}))


def test_tuples_and_other_mappings_become_what_json_has():
    info = types.MappingProxyType({"pair": (1, 2), "inner": types.MappingProxyType({"a": 1})})
    decoded = decode_group(encode_group(group_of(trajectory(info=info))))
    assert decoded.trajectories[0].info == {"pair": [1, 2], "inner": {"a": 1}}


def test_a_wrong_dtype_is_refused_not_converted():
    wide = trajectory("0/3", tokens_T=np.arange(5))
    with pytest.raises(InvariantViolation, match=r"0/3: tokens_T is int64\[5\], it must be int32\[5\]"):
        encode_group(group_of(trajectory(), wide))


def test_other_bytes_are_refused():
    batch = encode_batch(Batch(1, (), ()))
    with pytest.raises(JournalError, match=r"schema 'batch/3' where 'group/3' is needed"):
        decode_group(batch)
    with pytest.raises(JournalError, match="not a 'batch/3' Arrow stream"):
        decode_batch(b"nonsense")
    with pytest.raises(JournalError, match="not a 'batch/3' Arrow stream"):
        decode_batch(batch[: len(batch) // 2])
    with pytest.raises(JournalError, match="not a 'group/3' Arrow stream"):
        decode_group(b"")
