"""One thread that runs commands in order and, between them, steps for as long as there is work.

Callers put commands and get futures; only the thread touches what the commands touch, so nothing else needs a lock. An exception in a
step, or one that no command may raise, ends the thread and fails whatever waits, now and later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from verst.errors import DeadlineExceeded, EngineFailure, VerstError

T = TypeVar("T")


class DecodeThread:
    """`step` runs when no command waits and returns whether there is more to do; `ended` runs last, with the reason."""

    def __init__(self, name: str, step: Callable[[], bool], ended: Callable[[EngineFailure], None]) -> None:
        self._step, self._ended = step, ended
        self._commands: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()  # orders "put a command" against "no more commands"
        self._failure: EngineFailure | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Runs `command` in the thread. A `VerstError` or `OSError` fails this call alone, anything else the thread."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on cancelling has no effect, so a result may always be set
        with self._lock:
            if self._failure is not None:
                raise EngineFailure(str(self._failure)) from self._failure.__cause__
            self._commands.put((future, command))
        return future

    def stop(self, deadline_s: float) -> None:
        """Ends the thread after the step in progress. Raises `DeadlineExceeded` if it does not end in time."""
        self._commands.put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(f"{self._thread.name} did not finish its forward pass within {deadline_s:g} s of close()")

    def _run(self) -> None:
        failure = EngineFailure(f"{self._thread.name} is closed")
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: every defect must reach those who wait
            failure = EngineFailure(f"{self._thread.name} broke: {type(error).__name__}: {error}")
            failure.__cause__ = error
        self._end(failure)

    def _serve(self) -> None:
        """Commands as they come, steps between them, until told to stop."""
        busy = True
        while True:
            if busy and self._commands.empty():
                busy = self._step()
                continue
            item = self._commands.get()
            if item is None:
                return
            self._answer(*item)
            busy = True

    @staticmethod
    def _answer(future: Future[Any], command: Callable[[], Any]) -> None:
        try:
            future.set_result(command())
        except (VerstError, OSError) as error:
            future.set_exception(error)
        except BaseException as error:
            broken = EngineFailure(f"the engine broke: {type(error).__name__}: {error}")
            broken.__cause__ = error
            future.set_exception(broken)
            raise

    def _end(self, failure: EngineFailure) -> None:
        with self._lock:
            self._failure = failure
        self._ended(failure)
        while not self._commands.empty():
            item = self._commands.get_nowait()
            if item is not None:
                item[0].set_exception(failure)
