"""`verst watch RUN`: follows a run from any terminal that sees its directory, and changes nothing."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from verst.journal.lock import holder_of
from verst.observe.sinks import read_rows
from verst.runtime.rundir import RunDirectory

_LINES = 20
"""Shown of what was told before."""
_POLL_S = 0.5


def watch(path: str | Path, *, echo: Callable[[str], None]) -> None:
    """Shows a run's last lines and, if it is alive, those that come until it ends. Raises `ConfigError` if the path is no run."""
    run, config = RunDirectory.open(path)
    with (run.log if run.log.exists() else Path(os.devnull)).open(encoding="utf-8", errors="replace") as log:
        for line in deque(_lines(log), _LINES):
            echo(line)
        holder = holder_of(run.root)
        if holder is not None:
            echo(f"(following {holder}; Ctrl-C ends this, not the run)")
        while holder is not None:
            holder = holder_of(run.root)  # asked before reading, so that its last lines are read
            for line in _lines(log):
                echo(line)
            if holder is not None:
                time.sleep(_POLL_S)
    rows = read_rows(run.metrics) if run.metrics.exists() else []
    step = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
    if step >= config.run.steps:
        echo(f"the run is done: all {step} steps")
    else:
        echo(f"the run is not alive; step {step} of {config.run.steps} is the last one told; continue with: verst resume {run.root}")


def _lines(log: TextIO) -> list[str]:
    """The complete lines that were not read yet."""
    lines: list[str] = []
    while True:
        position = log.tell()
        line = log.readline()
        if not line.endswith("\n"):  # at its end, or still being written
            log.seek(position)
            return lines
        lines.append(line.removesuffix("\n"))
