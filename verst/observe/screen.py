"""Keeps the live view on a terminal, and gives the terminal back as it was: after Ctrl-C, an error or a signal too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from verst.observe.live import Frame, picture
from verst.observe.sinks import RowTail
from verst.observe.terminal import is_step_line

_KEPT_ROWS = 2000
"""Of which trends and failures are shown."""
_KEPT_LINES = 20
"""Of what the run told: they stay on the screen when the view is gone."""
_A_SECOND = 4
"""Refreshes."""


def is_possible() -> bool:
    """Whether standard output is a terminal that can move its cursor. `NO_COLOR` takes the colours away, not the view."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Screen:
    """The view, as long as it is entered: on the terminal's second screen, so that a resize leaves no traces. Then its last picture stays.

    Rows come from the run's metrics file, whoever writes it. One thread (rich's) reads and draws; `tell` may be called from any other.
    """

    def __init__(self, name: str, steps: int, metrics: Path, console: Console | None = None) -> None:
        self._name, self._steps = name, steps
        self._tail = RowTail(metrics, keep=_KEPT_ROWS)
        self._rows: list[dict[str, Any]] = []
        self._reading = threading.Lock()
        self._last: tuple[int, float] | None = None  # rows' newest step, and when this process first saw it
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._console = console or Console()
        self._live = Live(
            get_renderable=self._picture, console=self._console, screen=True, refresh_per_second=_A_SECOND, redirect_stderr=False
        )
        self._restore: Any = None

    def tell(self, line: str) -> None:
        """A line of the run; a step's is left to the rows."""
        if not is_step_line(line):
            self._lines.append(line)

    def __enter__(self) -> Screen:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._restore = signal.signal(signal.SIGTERM, _leave)  # else nobody would give the terminal back
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            self._live.stop()
            self._console.print(picture(self._frame(lines=False), self._console.width))
            for line in self._lines:
                self._console.print(Text(line), soft_wrap=True)
        if self._restore is not None:
            signal.signal(signal.SIGTERM, self._restore)

    def _picture(self) -> RenderableType:
        return picture(self._frame(), *self._console.size)

    def _frame(self, *, lines: bool = True) -> Frame:
        with self._reading, contextlib.suppress(OSError):  # of a shared disk, for a moment; what was read before is shown on
            self._rows = self._tail.read()
        rows = self._rows
        step = max((int(row["step"]) for row in rows), default=None)
        if step is not None and (self._last is None or step != self._last[0]):
            self._last = (step, time.monotonic())
        silent_s = None if self._last is None or not lines else time.monotonic() - self._last[1]
        return Frame(self._name, self._steps, rows, tuple(self._lines) if lines else (), silent_s)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
