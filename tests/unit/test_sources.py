import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verst.config.schema import DataConfig
from verst.data.prompts import to_prompt
from verst.data.sources import IterableSource, JsonlSource, ParquetSource, open_source
from verst.data.tasks import TaskSource, exact_json
from verst.errors import ConfigError, DataError
from verst.rewards.shipped import from_exact_json
from verst.types import Message


def config(**options) -> DataConfig:
    return DataConfig.model_validate(options)


DATA = config()


def prompts(source, data=DATA):
    return [to_prompt(row, data) for block in range(source.num_blocks) for row in source.read_block(block)]


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("block_bytes", [1, 7, 16, 100, 10**6])
def test_every_line_belongs_to_exactly_one_block(tmp_path, block_bytes):
    rows = [{"prompt": "x" * (i * 13 % 40)} for i in range(30)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    read = prompts(JsonlSource(path, block_bytes))
    assert [p.messages[0].content for p in read] == [row["prompt"] for row in rows]
    content = path.read_bytes()
    for prompt, row in zip(read, rows, strict=True):  # the id is the byte at which the line starts
        offset = int(prompt.id.removeprefix("a.jsonl:"))
        assert json.loads(content[offset:].split(b"\n")[0]) == row


def test_jsonl_ids_columns_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "one", "answer": 1}\r\n\n{"q": "two", "answer": [2, null]}\n\n \n')
    data = config(path=str(path), columns={"prompt": "q"}, system="Be brief.")
    first, second = prompts(open_source(data), data)
    assert first.messages == (Message("system", "Be brief."), Message("user", "one"))
    assert (first.id, first.fields) == ("a.jsonl:0", {"answer": 1})
    assert (second.id, second.fields) == ("a.jsonl:31", {"answer": [2, None]})


def test_messages_and_demonstrations():
    data = config(columns={"demonstration": "reply"})
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "2+2"}]
    rows = [{"prompt": turns, "reply": "4"}, {"prompt": "hi", "reply": [{"role": "assistant", "content": "ho"}], "n": 1}]
    first, second = prompts(open_source(data, rows), data)
    assert [m.content for m in first.messages] == ["hi", "yes?", "2+2"]
    assert first.demonstration == (Message("assistant", "4"),)
    assert (second.demonstration, second.fields) == ((Message("assistant", "ho"),), {"n": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nope}", "line 3: not JSON"),
        (b'{"prompt": NaN}', "line 3: not JSON: NaN is not a JSON number; write null"),
        (b"[1]", "line 3: a JSON array; each line must hold one JSON object"),
        (b"null", "line 3: a JSON null"),
        (b'{"prompt": "\xff"}', "line 3: byte 13 of the line is not UTF-8"),
        (
            b'{"promt": "x", "b": 1}',
            "line 3 has no column 'prompt'; nearest: promt; its columns: promt, b. Set data.columns, as in {prompt: COLUMN}",
        ),
        (b'{"prompt": null}', "line 3: column 'prompt' is null; it must be text or a list of {role, content}"),
        (b'{"prompt": 3}', "line 3: column 'prompt' is int"),
        (b'{"prompt": []}', "line 3: column 'prompt' is an empty list"),
        (
            b'{"prompt": [{"role": "user"}]}',
            'line 3: column \'prompt\', message 0 must be {role, content}, both text, and is {"role": "user"}',
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(DataError) as error:
        prompts(JsonlSource(path, 8))
    assert str(error.value).startswith(f"{path}, {message}")


def test_parquet_types_become_json(tmp_path):
    path = tmp_path / "a.parquet"
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "when": datetime.datetime(2024, 5, 1, 12, 30),
        "price": decimal.Decimal("1.50"),
        "wait": datetime.timedelta(seconds=90),
        "score": float("nan"),
        "tags": ["a", None],
    }
    pq.write_table(pa.Table.from_pylist([row, row, row]), path, row_group_size=2)
    source = open_source(config(path=str(path)))
    assert source.num_blocks == 2
    read = prompts(source)
    assert [p.id for p in read] == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]
    assert read[2].fields == {"when": "2024-05-01T12:30:00", "price": "1.50", "wait": 90.0, "score": None, "tags": ["a", None]}


def test_parquet_window_follows_the_size_of_its_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"prompt": [f"{i:0100}" for i in range(1000)]}), path, row_group_size=100, compression="none", use_dictionary=False
    )
    assert ParquetSource(path, window_bytes=3 * 10_500).window_blocks in (2, 3)
    assert ParquetSource(path, window_bytes=1).window_blocks == 1


def test_a_bad_parquet_file_is_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 100] * 50, "image": [b"\x00\xff"] * 50}), whole)
    with pytest.raises(DataError, match=r"whole.parquet, row 0, column 'image' holds bytes, which JSON cannot hold: drop the column"):
        prompts(ParquetSource(whole))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut.parquet is not a readable Parquet file .*truncated"):
        open_source(config(path=str(cut)))
    damaged = tmp_path / "damaged.parquet"
    content = bytearray(whole.read_bytes())
    content[4:40] = b"\xff" * 36
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged.parquet, row group 0 cannot be read"):
        prompts(ParquetSource(damaged))


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").write_text("x")
    for name, message in [("no.jsonl", "does not exist"), ("", "is a directory"), ("empty.jsonl", "is empty"), ("a.csv", "ends in '.csv'")]:
        with pytest.raises(DataError, match=message):
            open_source(config(path=str(tmp_path / name)))


def test_exactly_one_source():
    with pytest.raises(ConfigError, match="no source of prompts given"):
        open_source(DATA)
    with pytest.raises(ConfigError, match=r"data.path and rows given: set exactly one"):
        open_source(config(path="a.jsonl"), ["x"])


def test_rows_from_python():
    assert [p.messages[0].content for p in prompts(open_source(DATA, ["a", {"prompt": "b"}]))] == ["a", "b"]
    with pytest.raises(DataError, match="rows is a str"):
        open_source(DATA, "prompt")
    with pytest.raises(DataError, match="rows is empty"):
        open_source(DATA, [])
    with pytest.raises(DataError, match=r"rows\[1\] is a int"):
        prompts(open_source(DATA, ["a", 1]))
    with pytest.raises(DataError, match=r"rows\[0\], column 'x' holds object"):
        prompts(open_source(DATA, [{"prompt": "a", "x": object()}]))


def test_an_iterator_is_taken_row_by_row():
    taken = []

    def rows():
        for i in range(100):
            taken.append(i)
            yield f"row {i}"

    source = open_source(DATA, rows())
    assert isinstance(source, IterableSource)
    assert not source.rereadable
    rows_read = source.read_block(2)  # skips two, as a resumed run does
    assert rows_read is not None
    assert to_prompt(rows_read[0], DATA).messages[0].content == "row 2"
    assert taken == [0, 1, 2]
    with pytest.raises(DataError, match="one-shot iterator that gave 3 rows"):
        source.read_block(0)


def test_task_rows_are_a_function_of_options_and_index():
    first, again = TaskSource("chain_sum", {"min_terms": 2}), TaskSource("chain_sum", {"min_terms": 2})
    other = TaskSource("chain_sum", {"min_terms": 2, "seed": 1})
    read = [[to_prompt(row, DATA) for row in source.read_block(5)] for source in (first, again, other)]
    assert read[0] == read[1]
    assert read[0] != read[2]
    assert read[0][0].id == "chain_sum:320"
    assert read[0][0].fields.keys() == {"answer", "task", "options", "entry"}
    assert json.loads(json.dumps(read[0][0].fields)) == read[0][0].fields


def test_a_task_with_a_size_has_the_rows_of_that_data_set():
    import reasoning_gym

    expected = [entry["question"] for entry in reasoning_gym.create_dataset("leg_counting", size=70, seed=4)]
    source = TaskSource("leg_counting", {"size": 70, "seed": 4})
    assert [p.messages[0].content for p in prompts(source)] == expected
    assert not source.unlimited


@pytest.mark.parametrize("task", ["word_ladder", "list_functions", "gsm_symbolic"])  # these prepare all rows when made
def test_no_index_is_too_large(task):
    source = TaskSource(task, {})
    rows = source.read_block(2**31)
    assert to_prompt(rows[3], DATA).messages[0].content


def test_unknown_tasks_and_options_are_named():
    with pytest.raises(DataError, match=r"'chain_summ' is not a task of reasoning-gym; nearest: chain_sum"):
        open_source(config(task="chain_summ"))
    with pytest.raises(DataError, match=r"do not fit task 'chain_sum'.*; nearest: min_terms.*its options: .*max_terms"):
        open_source(config(task="chain_sum", options={"min_term": 2}))
    with pytest.raises(DataError, match="do not fit task 'chain_sum'"):
        open_source(config(task="chain_sum", options={"min_terms": 9, "max_terms": 2}))
    with pytest.raises(DataError, match="'composite' is configured with Python objects"):
        open_source(config(task="composite"))
    with pytest.raises(DataError, match="size is 'many'"):
        open_source(config(task="chain_sum", options={"size": "many"}))


def test_entries_survive_json_exactly():
    entry = {"a": (1, ("b", [2.5, None])), "b": {1: "x", (2, 3): {}}, "c": {"tuple": [1]}, "d": [{"mapping": (1,)}], "e": {}}
    assert from_exact_json(json.loads(json.dumps(exact_json(entry, "here")))) == entry


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("columns", "row", "prompt", "demonstration", "fields"),
    [
        # TRL's types of data, in their conversational form
        ({}, {"prompt": TURNS[:2], "answer": 4}, ["Be brief.", "2+2"], [], {"answer": 4}),
        ({"demonstration": "completion"}, {"prompt": TURNS[:2], "completion": TURNS[2:]}, ["Be brief.", "2+2"], ["4"], {}),
        ({}, {"messages": TURNS, "source": "a"}, ["Be brief.", "2+2"], ["4"], {"source": "a"}),
        ({}, {"messages": [*TURNS, *TURNS[1:]]}, ["Be brief.", "2+2"], ["4", "2+2", "4"], {}),
        ({}, {"messages": TURNS[:2]}, ["Be brief.", "2+2"], [], {}),
        # and their standard form
        ({"demonstration": "completion"}, {"prompt": "2+2", "completion": "4"}, ["2+2"], ["4"], {}),
        # ShareGPT
        (
            {"messages": "conversations"},
            {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
            ["2+2"],
            ["4"],
            {},
        ),
        # text in parts, as multimodal templates want it
        ({}, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2"}, {"text": "+2"}]}]}, ["2+2"], [], {}),
        # names of one's own
        ({"prompt": "question", "answer": "final"}, {"question": "2+2", "final": 4, "answer": "so 4"}, ["2+2"], [], {"answer": 4}),
        ({"demonstration": "answer", "answer": "answer"}, {"prompt": "2+2", "answer": "4"}, ["2+2"], ["4"], {"answer": "4"}),
        ({}, {"prompt": "2+2", "messages": "a field"}, ["2+2"], [], {"messages": "a field"}),
        ({}, {"prompt": "2+2", "demonstration": "4"}, ["2+2"], ["4"], {}),
        ({}, {"prompt": "2+2", "demonstration": None}, ["2+2"], [], {}),
    ],
)
def test_columns_by_their_names(columns, row, prompt, demonstration, fields):
    data = config(columns=columns)
    (read,) = prompts(open_source(data, [row]), data)
    assert [message.content for message in read.messages] == prompt
    assert [message.content for message in read.demonstration] == demonstration
    assert read.fields == fields


def test_roles_of_other_forms_become_those_of_chat_templates():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (read,) = prompts(open_source(DATA, [{"messages": turns}]))
    assert [message.role for message in (*read.messages, *read.demonstration)] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({}, {"messages": TURNS[2:]}, "begins with an answer: there is no prompt before it"),
        (
            {},
            {"prompt": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "message 0 has tool_calls, which Verst does not render",
        ),
        ({}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 must be {role, content}, both text"),
        ({"answer": "finale"}, {"prompt": "a", "final": 1}, "no column 'finale'; nearest: final; its columns: prompt, final"),
        ({"prompt": "question"}, {"prompt": "a"}, "Set data.columns, as in {prompt: COLUMN}"),
    ],
)
def test_a_row_that_is_not_understood_is_named(columns, row, message):
    data = config(columns=columns)
    with pytest.raises(DataError) as error:
        prompts(open_source(data, [{"prompt": "fine", "question": "fine", "final": 1, "finale": 1}, row]), data)
    assert str(error.value).startswith("rows[1]")
    assert message in str(error.value)
