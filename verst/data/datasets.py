"""Prompts from the library datasets: names on the hub, directories of data files, and what `save_to_disk` wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from verst.data.sources import Row, SequenceSource, json_value
from verst.errors import ConfigError, DataError, first_line

_OURS = ("path", "streaming", "cache_dir", "token", "trust_remote_code")
"""Arguments of `load_dataset` that are not for a run file, with HF_HOME and HF_TOKEN in their places."""


class DatasetSource(SequenceSource):
    """The rows of one split, read from the disk one at a time, by index."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        rows = _load(name, options)
        if not len(rows):
            raise DataError(f"data.dataset {name} has no row in this split: name another in data.options, {{split: …}}")
        super().__init__(rows, "prompt")
        self.name = Path(name).name
        self._dataset, self._options = name, dict(options)

    def fingerprint(self) -> Mapping[str, Any]:
        ends = json.dumps([self._load(0), self._load(len(self._rows) - 1)], sort_keys=True)
        digest = hashlib.blake2b(ends.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return {"dataset": self.name, "options": json_value(self._options, "data.options"), "rows": len(self._rows), "ends": digest}

    def _row(self, index: int) -> Row:
        return Row(f"{self.name}:{index}", partial(self._load, index), lambda: self._locate(index))

    def _load(self, index: int) -> Mapping[str, Any]:
        return {name: json_value(value, f"{self._locate(index)}, column {name!r}") for name, value in self._rows[index].items()}

    def _locate(self, index: int) -> str:
        return f"data set {self._dataset}, row {index}"


def _load(name: str, options: Mapping[str, Any]) -> Any:
    """A `datasets.Dataset`. Raises `ConfigError` for options that are not its, `DataError` if it cannot be had, with what to do."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"data.dataset needs the library datasets ({error}): pip install 'verst[datasets]'") from error
    refused = [option for option in options if option in _OURS]
    if refused:
        raise ConfigError(f"data.options.{refused[0]} is not taken: data.dataset names the data, HF_HOME the cache, HF_TOKEN the token")
    split = options.get("split", "train")
    if not isinstance(split, str):
        raise ConfigError(f"data.options.split is {split!r}: give one split by name, such as train or 'train[:1000]'")
    directory = Path(name).expanduser()
    one_split = (directory / "state.json").is_file()
    if one_split and options:
        raise ConfigError(f"data.options do not apply: {name} is one split, as save_to_disk wrote it. Remove them")
    try:
        if one_split:  # which load_dataset refuses
            return datasets.load_from_disk(str(directory))
        return datasets.load_dataset(str(directory) if directory.is_dir() else name, **{**options, "split": split})
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, DatasetsError) as error:
        reason = first_line(error.__cause__ or error)[:200]
        raise DataError(f"data.dataset {name} cannot be loaded: {reason}. {_remedy(error, name, directory.is_dir())}") from error


def _remedy(error: Exception, name: str, local: bool) -> str:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return f"Look at https://huggingface.co/datasets/{name}; if it is private or gated, set HF_TOKEN, or log in with: hf auth login"
    if isinstance(error, ConnectionError):
        return (
            f"There is no such directory in {Path.cwd()}, and the hub cannot be reached. Where there is a network: hf download --repo-type "
            f"dataset {name} --local-dir DIR; copy DIR here, and set data.dataset=DIR"
        )
    if isinstance(error, ValueError | TypeError | LookupError):
        return "Set data.options to what datasets.load_dataset takes, as in {name: main, split: train}"
    if isinstance(error, DatasetGenerationError):
        return "Mend the data files: all rows need the same columns"
    return "Give a directory with .jsonl, .csv or .parquet files" if local else "Try again, or download it and give the directory"
