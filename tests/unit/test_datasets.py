"""Prompts by way of the library datasets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from verst import cli
from verst.config.load import load_config
from verst.config.schema import DataConfig
from verst.data.sources import open_source
from verst.data.stream import PromptStream
from verst.errors import ConfigError, DataError
from verst.recipes.run_file import Asked, write_run_file

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Ten rows to train on and three to test on, as data files."""
    path = tmp_path / "sums"
    path.mkdir()
    for split, count in (("train", 10), ("test", 3)):
        rows = ({"question": f"{split} {i}", "answer": str(i)} for i in range(count))
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(directory: Path, **options: object) -> DataConfig:
    return DataConfig(dataset=str(directory), columns={"prompt": "question"}, options=options)  # pyright: ignore[reportArgumentType]


def texts(data: DataConfig, count: int) -> list[str]:
    stream = PromptStream(open_source(data), data, 0)
    return [stream.next().messages[0].content for _ in range(count)]


def test_splits_and_slices(directory: Path):
    assert sorted(texts(config(directory), 10)) == sorted(f"train {i}" for i in range(10))
    assert sorted(texts(config(directory, split="test"), 3)) == ["test 0", "test 1", "test 2"]
    assert sorted(texts(config(directory, split="train[2:4]"), 2)) == ["train 2", "train 3"]


def test_what_save_to_disk_wrote(directory: Path, tmp_path: Path):
    loaded = datasets.load_dataset(str(directory))
    loaded.save_to_disk(str(tmp_path / "all"))
    loaded["test"].save_to_disk(str(tmp_path / "one"))  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    assert sorted(texts(config(tmp_path / "all", split="test"), 3)) == ["test 0", "test 1", "test 2"]
    assert sorted(texts(config(tmp_path / "one"), 3)) == ["test 0", "test 1", "test 2"]
    with pytest.raises(ConfigError, match=r"data.options do not apply: .*one is one split"):
        open_source(config(tmp_path / "one", split="test"))


def test_prompts_have_ids_and_fields(directory: Path):
    data = config(directory)
    prompt = PromptStream(open_source(data), data.model_copy(update={"shuffle": False}), 0).next()
    assert (prompt.id, prompt.fields) == ("sums:0", {"answer": "0"})


def test_other_rows_are_not_resumed_on(directory: Path):
    data = config(directory)
    before = PromptStream(open_source(data), data, 0).state()
    file = directory / "train.jsonl"
    file.write_text(file.read_text().replace('"train 9"', '"train x"'))
    with pytest.raises(DataError, match="Give the data it was saved with"):
        PromptStream(open_source(data), data, 0).restore(json.loads(json.dumps(before)))


def test_a_column_that_json_cannot_hold_is_named(tmp_path: Path):
    datasets.Dataset.from_dict({"prompt": ["a"], "image": [b"\x00"]}).save_to_disk(str(tmp_path / "bytes"))
    data = DataConfig(dataset=str(tmp_path / "bytes"))
    with pytest.raises(DataError, match=r"data set .*bytes, row 0, column 'image' holds bytes"):
        PromptStream(open_source(data), data, 0).next()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"split": "tset"}, DataError, r"Unknown split .tset.*Set data.options .*as in \{name: main, split: train\}"),
        ({"name": "socratic"}, DataError, "'socratic' not found.*Set data.options"),
        ({"nmae": "main"}, DataError, "Set data.options"),
        ({"split": ["train", "test"]}, ConfigError, "data.options.split is .*give one split by name"),
        ({"streaming": True}, ConfigError, "data.options.streaming is not taken"),
        ({"split": "train[:0]"}, DataError, "corresponds to no data"),
    ],
)
def test_bad_options_are_named(directory: Path, options: dict[str, object], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        open_source(config(directory, **options))


def test_directories_without_data_are_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be loaded: .*any data files.*Give a directory with .jsonl"):
        open_source(config(tmp_path / "empty"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text("{nope")
    with pytest.raises(DataError, match=r"bad cannot be loaded: .*Mend the data files"):
        open_source(config(tmp_path / "bad"))


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path):
    """In a process of its own: the library reads HF_HUB_OFFLINE when it is imported."""
    code = "from verst.data.sources import DataConfig, open_source; open_source(DataConfig(dataset='org/sums'))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "DataError: data.dataset org/sums cannot be loaded" in done.stderr
    assert "hf download --repo-type dataset org/sums --local-dir DIR" in done.stderr


def test_init_finds_the_columns_of_a_data_set(tmp_path: Path, directory: Path, tiny: Path):
    file = write_run_file(tmp_path / "run.yaml", Asked(str(directory), str(tiny)))
    written = load_config(file)
    assert (written.data.dataset, written.data.columns) == (str(directory), {"prompt": "question"})
    assert written.reward.options == {"field": "answer"}
    assert cli.main(["check", str(file)]) == 0
