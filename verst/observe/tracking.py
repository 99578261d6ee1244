"""Reports to trackers, which may be slow, full, gone or broken: none of it may end a run, nor hold it up.

    who                  takes                 gives                  waits for
    the run              -                     a report a step        nothing: a full queue loses the report, counted
    thread of a tracker  one report at a time  to its tracker         the tracker, whatever that waits for

A tracker's first failure is told, every report that it did not take is counted, and each new report is tried again.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from verst.observe.trackers import Report, Tracker
from verst.secrets import is_secret

T = TypeVar("T")

_WAITING = 256
"""Reports that may wait for a tracker."""
CLOSE_S = 20.0
"""How long the end of a run waits for trackers that have not sent everything yet."""
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


class Tracking:
    """All trackers of one run. Called by the run's own thread only."""

    def __init__(self, open_by_name: Mapping[str, Callable[[], Tracker]] | None = None, *, after: int = -1) -> None:
        """`after`: the last step that was reported before a restart. Steps up to it, trained again, are not reported again."""
        self._after = after
        self._lines: deque[str] = deque()
        self._feeds = [_Feed(name, opened, self._lines) for name, opened in (open_by_name or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._feeds)

    def takes(self, step: int) -> bool:
        """Whether a report of this step is news to somebody."""
        return bool(self._feeds) and step > self._after

    def report(self, report: Report) -> None:
        """Leaves a report for every tracker, at once."""
        if self.takes(report.step):
            self._after = report.step
            for feed in self._feeds:
                feed.put(report)

    @property
    def lost(self) -> int:
        """Reports that a tracker did not take, all trackers together."""
        return sum(feed.lost for feed in self._feeds)

    def told(self) -> list[str]:
        """Warnings since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def close(self, deadline_s: float = CLOSE_S) -> None:
        """Lets the trackers take what waits for them. One that has not after the deadline is left, and that is told."""
        end = time.monotonic() + deadline_s
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(end - time.monotonic())


class _Feed:
    """One tracker, its thread and what waits for it."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], lines: deque[str]) -> None:
        self._name, self._open, self._lines = name, open_tracker, lines
        self._queue: queue.Queue[Report | None] = queue.Queue(_WAITING)
        self._counting = threading.Lock()
        self._warned = False
        self._ending = threading.Event()
        self.lost = 0
        # a daemon: a tracker that never answers must not keep the process from ending
        self._thread = threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, report: Report) -> None:
        try:
            self._queue.put_nowait(report)
        except queue.Full:
            self._lose(f"{_WAITING} reports wait for it already")

    def end(self) -> None:
        self._ending.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def join(self, deadline_s: float) -> None:
        self._thread.join(max(0.0, deadline_s))
        if self._thread.is_alive():
            self._lines.append(f"warning: tracker {self._name} has not taken everything in time: its last reports are missing")

    def _serve(self) -> None:
        tracker = self._guarded(self._open, self._warn)  # now, so that a missing login is told when the run begins
        while (report := self._next()) is not None:
            tracker = tracker or self._guarded(self._open, self._warn)
            if tracker is None:
                self._lose("it cannot be opened")
            else:
                self._guarded(partial(tracker.log, report), self._lose)
        if tracker is not None:
            self._guarded(tracker.close, self._warn)

    def _guarded(self, call: Callable[[], T], tell: Callable[[str], None]) -> T | None:
        """What a tracker's own code gives; None if it raises, whatever that is: none of it may end the run."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - the boundary to code that is not ours
            tell(f"{type(error).__name__}: {error}")
            return None

    def _next(self) -> Report | None:
        """The next report; None once it is the end and none is left."""
        while True:
            try:
                return self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._ending.is_set():
                    return None

    def _lose(self, reason: str) -> None:
        with self._counting:
            self.lost += 1
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            first = redacted(reason).strip().splitlines()[0][:300]
            goes_on = "the run goes on, and metrics.jsonl has everything; further losses are only counted (tracking/lost)"
            self._lines.append(f"warning: tracker {self._name}: {first}; {goes_on}")


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without what must not be in a log: values of variables that look like keys, and credentials in addresses."""
    variables = os.environ if environment is None else environment
    for name, value in variables.items():
        if is_secret(name) and len(value) >= 6:
            text = text.replace(value, f"${name}")
    return _IN_URL.sub("...", text)
