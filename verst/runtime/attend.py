"""Watching over a run's loop from the process that began it: its lines, the signals of a person, and its deaths."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from verst.runtime.rundir import RunDirectory
from verst.runtime.shown import Echo

_DEATHS = 4
_DEATHS_S = 600.0
"""So many deaths of the loop's process in that time end the run: something kills it that no restart mends."""

_AGAIN_S = 120.0
"""Limit of the start of another one."""


@dataclass(frozen=True)
class Asked:
    """What signals have asked for: that the run ends at a consistent point; that it tells who waits for whom; that this process leaves."""

    stop: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)
    standing: threading.Event = field(default_factory=threading.Event)
    lines: list[str] = field(default_factory=list)
    """What to tell about it. A handler must not write itself: it may interrupt a line that is being written."""


@contextlib.contextmanager
def signals(run: RunDirectory, *, leaves: bool = False) -> Iterator[Asked]:
    """The first Ctrl-C or SIGTERM asks the run to end at a consistent point, the second ends it at once; SIGUSR1 asks what it waits for.

    `leaves`: the run does not need this process, so SIGHUP (the terminal was closed) only ends the watching.
    """
    asked = Asked()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if asked.stop.is_set():
            raise KeyboardInterrupt(f"ended at once by a second signal; continue from the last commit with: verst resume {run.root}")
        name = signal.Signals(number).name
        asked.lines.append(f"{name}: ending after the step in progress; once more to end at once (nothing committed is lost)")
        asked.stop.set()

    def on_hangup(_number: int, _frame: FrameType | None) -> None:
        asked.leave.set()

    def on_question(_number: int, _frame: FrameType | None) -> None:
        asked.standing.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python delivers signals to the main thread only; its owner decides there
        return
    handlers: dict[signal.Signals, Any] = {signal.SIGINT: on_signal, signal.SIGTERM: on_signal, signal.SIGUSR1: on_question}
    if leaves and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        handlers[signal.SIGHUP] = on_hangup
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def while_open(echo: Echo, asked: Asked) -> Echo:
    """The same, where a closed terminal or pipe is no error but ends the watching."""

    def tell(line: str) -> None:
        try:
            echo(line)
        except OSError:
            asked.leave.set()

    return tell


def watch_over(handle: Any, asked: Asked, echo: Echo) -> None:
    """Shows the run's lines until it ends or the terminal is closed; raises what the run raised.

    Should the loop's process die, Ray starts another one, which finds the processes that live and goes on from the journal.
    """
    from verst.runtime.actors import WorkerDied

    watch, deaths = _Watch(handle, asked, echo), deque[float](maxlen=_DEATHS)
    while True:
        try:
            return watch.until_it_ends()
        except WorkerDied as error:
            deaths.append(time.monotonic())
            if len(deaths) == _DEATHS and deaths[-1] - deaths[0] < _DEATHS_S:
                raise WorkerDied(
                    f"the loop's process died {_DEATHS} times in {deaths[-1] - deaths[0]:.0f} s, so another one would die too. "
                    "Its journal is intact: mend the cause, then verst resume. Where the memory of a machine is full, Ray ends the loop "
                    f"first, because it can be started again (`ray list cluster-events`). The last death: {error}"
                ) from error
            _until_it_answers(handle, error)
            echo("the loop's process died: it starts again and goes on from its journal")
            watch = _Watch(handle, asked, echo)


def _until_it_answers(handle: Any, death: Exception) -> None:
    """Waits until Ray has started the loop's process again. Raises `death` if it does not."""
    import ray
    from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

    limit = time.monotonic() + _AGAIN_S
    while time.monotonic() < limit:
        try:
            ray.get(handle.where.remote(), timeout=_AGAIN_S)
        except ActorUnavailableError:  # it is starting
            time.sleep(0.2)
        except (RayActorError, GetTimeoutError):
            break
        else:
            return
    raise death


class _Watch:
    """Over one life of the loop's process."""

    def __init__(self, handle: Any, asked: Asked, echo: Echo) -> None:
        self._handle, self._asked, self._echo = handle, asked, echo
        self._running = handle.call.remote("run")
        self._seen, self._told = 0, False

    def until_it_ends(self) -> None:
        """Or until the terminal is closed. Raises `WorkerDied` with the process."""
        import ray

        from verst.runtime.actors import unwrapped

        while not self._asked.leave.is_set():
            ended = bool(ray.wait([self._running], timeout=0)[0])
            lines = self._lines(0.0 if ended else 0.5)
            if lines is None:
                continue
            self._pass_on(lines)
            if ended and not lines:
                with unwrapped("loop", "run"):
                    ray.get(self._running, timeout=60)
                return

    def _lines(self, wait_s: float) -> list[str] | None:
        """None: it is busy, not dead, for a dead one raises at once."""
        import ray
        from ray.exceptions import GetTimeoutError

        from verst.runtime.actors import unwrapped

        with unwrapped("loop", "watching"):
            try:
                self._seen, lines = ray.get(self._handle.call.remote("lines", self._seen, wait_s), timeout=60)
            except GetTimeoutError:
                return None
        return lines

    def _pass_on(self, lines: Sequence[str]) -> None:
        """The run's lines to a person, and what a person has asked for to the run."""
        asked = self._asked
        if asked.standing.is_set():
            asked.standing.clear()
            self._handle.call.remote("tell_standing")
        stopping = asked.stop.is_set() and not self._told
        for line in (*lines, *(asked.lines if stopping else ())):
            self._echo(line)
        if stopping:
            self._told = True
            self._handle.call.remote("stop")
