"""Where metrics go. A sink takes rows of plain numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verst.errors import VerstError
from verst.observe.tail import LineTail

_GENERATED = "tokens_per_s"
"""Stands in the rows of those steps during which tokens were generated."""


class JsonlSink:
    """`metrics.jsonl`: one JSON object a row, appended and flushed, so that a crash loses nothing reported.

    Non-finite numbers are written as null: JSON has no NaN.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        if _torn(path):  # a crash cut the last line short; the next one must not be appended to it
            self._file.write("\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Raises `VerstError` if the disk does not take it."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise VerstError(f"{self._path}: metrics could not be written ({error.strerror}): make room, then resume the run") from error

    def close(self) -> None:
        self._file.close()


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, as `RowTail` gives them. Raises `FileNotFoundError` if there is none."""
    path.stat()
    return RowTail(path).read()


class RowTail:
    """The rows of a metrics file that may still grow, in order of step; a line that a crash cut short, or that is no row, is skipped.

    Of steps trained again after a restart the last row counts. If nothing was generated for it again, speed and times stay those of the
    first time: training journaled groups says nothing about the pace of the run.
    """

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        """`keep`: how many rows, the newest; default: all of them."""
        self._lines = LineTail(path)
        self._keep = keep
        self._rows: dict[tuple[int, str], dict[str, Any]] = {}

    def read(self) -> list[dict[str, Any]]:
        """All rows until now. A tail that is asked again reads only what is new."""
        for line in self._lines.read():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or not {"step", "kind"} <= row.keys():
                continue
            key = (row["step"], row["kind"])
            self._rows[key] = _with_speed_of(self._rows[key], row) if key in self._rows else row
        order = sorted(self._rows)
        for key in order[: -self._keep] if self._keep else ():
            del self._rows[key]
        return [self._rows[key] for key in sorted(self._rows)]


def _with_speed_of(first: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    if _GENERATED not in first or _GENERATED in again:
        return again
    return {k: v for k, v in again.items() if not _is_speed(k)} | {k: v for k, v in first.items() if _is_speed(k)}


def _is_speed(name: str) -> bool:
    return name in (_GENERATED, "rollout/generating") or name.startswith(("time/", "idle/", "wait/"))
