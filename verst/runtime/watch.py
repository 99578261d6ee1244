"""`verst watch RUN`: follows a run from any terminal that sees its directory, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from verst.journal.lock import holder_of
from verst.observe.sinks import read_rows
from verst.observe.tail import LineTail
from verst.runtime.rundir import RunDirectory
from verst.runtime.shown import shown

_LINES = 20
"""Shown of what was told before."""
_POLL_S = 0.5


def watch(path: str | Path, *, echo: Callable[[str], None], live: bool = False) -> None:
    """Shows a run's last lines and, if it is alive, those that come until it ends; `live`: as `verst.train` does.

    Raises `ConfigError` if the path is no run.
    """
    run, config = RunDirectory.open(path)
    with shown(run, config.run.steps, echo, live=live) as tell:
        _follow(run, tell)
        rows = read_rows(run.metrics) if run.metrics.exists() else []
        step = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
        if step >= config.run.steps:
            tell(f"the run is done: all {step} steps")
        else:
            tell(f"the run is not alive; step {step} of {config.run.steps} is the last one told; continue with: verst resume {run.root}")


def _follow(run: RunDirectory, tell: Callable[[str], None]) -> None:
    log = LineTail(run.log)
    for line in log.read()[-_LINES:]:
        tell(line)
    holder = holder_of(run.root)
    if holder is not None:
        tell(f"(following {holder}; Ctrl-C ends this, not the run)")
    while holder is not None:
        holder = holder_of(run.root)  # asked before reading, so that its last lines are read
        for line in log.read():
            tell(line)
        if holder is not None:
            time.sleep(_POLL_S)
