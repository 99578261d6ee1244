"""Where the coroutines of environments, agents and rollout functions run: in an event loop on a thread of its own.

So one that blocks its loop, by `requests.get` or `while True`, holds up others of its kind for a while, and never the engine, the
endpoints or the deadlines, which are in the worker's loop. All trajectories of a replica share one loop, since their code shares clients.

Who waits for whom: the worker's loop waits for a call up to its deadline, and watches meanwhile that the thread answers. One step of a task
that holds it longer than it may has blocked it, and so has one of a caller that is overdue. It is interrupted, which ends what computes
in Python. What waits in C goes on, and nobody can end it: that thread is given up. Calls that it had not begun begin on another one;
those it was in the midst of have failed with their loop, by a message that names who has blocked it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from verst.errors import EnvironmentFailure
from verst.extend import origin

T = TypeVar("T")

_log = logging.getLogger(__name__)

GRACE_S = 2.0
"""Whoever is overdue and holds the thread for so long still has blocked it. On a busy machine a thread may need a while to answer."""
HOLD_S = 60.0
"""For which one step of a task may hold the thread."""
_WATCH_S = 1.0
"""Between two looks whether it answers, while there are calls."""
_YIELD_S = 1.0
"""Within which Python code that was interrupted gives the thread back."""
_LIBRARIES = ("<frozen ", *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


class _Interrupted(BaseException):
    """Raised in the midst of code that blocks its loop. No `Exception`, which such code might catch and go on."""


@dataclass(eq=False, slots=True)
class Caller:
    """A trajectory whose code runs in the loop."""

    name: str
    """By which messages call it."""
    began: float | None = 0.0
    """When its last call had its first turn in the loop (`time.monotonic`); None: it still waits for it."""


_caller: ContextVar[Caller | None] = ContextVar("_caller", default=None)
"""Whose code this is: tasks that it starts inherit it."""


async def across(coroutine: Coroutine[Any, Any, T], home: asyncio.AbstractEventLoop) -> T:
    """What a coroutine gives that belongs to the loop `home`, from whatever loop. Who cancels it cancels that.

    They begin there in the order in which they were made.
    """
    if asyncio.get_running_loop() is home:
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, home))


def settle(ended: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Gives a future what user code has returned or raised. The first outcome counts."""
    if ended.done():
        return
    if error is None:
        ended.set_result(result)
    elif isinstance(error, asyncio.CancelledError):
        ended.cancel()
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):  # which no future takes
        ended.set_exception(error)
    else:  # SystemExit and the like, which would end the worker
        ended.set_exception(EnvironmentFailure(f"raised {origin(error)}"))


class UserLoop:
    """The loop, on a new thread whenever one was given up. Its methods belong to the worker's loop.

    A thread begins with the first call, and ends with `close`, or once this object is not used any more.

    Args:
        hold_s: for which one step of a task may hold the thread.
    """

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._thread: _Thread | None = None
        self._watching: asyncio.Task[None] | None = None
        self._held: dict[_Thread, str] = {}
        self._given_up = 0
        self._freed = 0.0

    async def run(self, call: Callable[[], Awaitable[T]], caller: Caller) -> T:
        """What `await call()` gives in the loop. Who cancels it cancels that, and waits for its end; who does so twice does not.

        Calls begin in the order in which they were made. Raises what the call raises, and `EnvironmentFailure` if it has blocked the loop,
        or has lost it to another one that has.
        """
        made = _Call(call, caller, asyncio.get_running_loop().create_future())
        caller.began = None
        self._ready().begin(made)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        while not made.ended.done():
            try:
                await asyncio.wait({made.ended})
            except asyncio.CancelledError:
                if made.cancel():
                    raise
        return made.ended.result()

    async def within(self, work: asyncio.Future[Any], deadline_s: float, caller: Caller) -> bool:
        """Whether work that stands on calls of `caller` ends within so many seconds. They count from the turn of its call."""
        since = time.monotonic()
        while not work.done():
            await asyncio.wait({work}, timeout=self.left_s(caller, since, deadline_s))
            if not work.done() and await self.overdue(caller, since, deadline_s):
                return work.done()
        return True

    def left_s(self, caller: Caller, since: float, deadline_s: float) -> float:
        """What is left of a time of `deadline_s` that a caller has since then (`time.monotonic`), without what others took by blocking."""
        now = time.monotonic()
        began = now if caller.began is None else caller.began
        return max(0.0, max(since, began, self._freed) + deadline_s - now)

    async def overdue(self, caller: Caller, since: float, deadline_s: float) -> bool:
        """Whether that time is over, if it seems to be. Takes the loop from whoever has blocked it."""
        if caller.began is None or not self.left_s(caller, since, deadline_s):
            await self._unblock(caller)
        return caller.began is not None and not self.left_s(caller, since, deadline_s)

    @property
    def held(self) -> str | None:
        """Who blocks the loop at this moment, and where."""
        return next(iter(self._held.values()), None)

    def close(self) -> None:
        """Ends the thread as soon as nothing holds it. What runs in it is cancelled."""
        if self._watching is not None:
            self._watching.cancel()
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _ready(self) -> _Thread:
        if self._thread is None:
            self._thread = _Thread()
            weakref.finalize(self, self._thread.end).atexit = False
        return self._thread

    async def _watch(self) -> None:
        while self._thread is not None and self._thread.calls:
            await asyncio.sleep(_WATCH_S)
            await self._unblock(None)

    async def _unblock(self, overdue: Caller | None) -> None:
        """Returns once the thread answers, or is another one. A caller that is overdue may hold it no longer."""
        if (thread := self._thread) is None:
            return
        answer, asked_at = thread.answer(), time.monotonic()
        holder, since = thread.holder(), asked_at
        while not await _any({answer, thread.lost}, GRACE_S):
            self._held[thread] = self._described(thread)
            now = time.monotonic()
            if thread.holder() is not holder:
                holder, since = thread.holder(), now
            elif now - since >= self._hold_s or (overdue is not None and thread.caller_of(holder) is overdue):
                thread.freeing = thread.freeing or asyncio.ensure_future(self._free(thread, holder))
                await asyncio.shield(thread.freeing)
                break
        self._held.pop(thread, None)
        if overdue is not None and thread.caller_of(holder) is not overdue and time.monotonic() - asked_at > GRACE_S:  # another held it
            self._freed = time.monotonic()

    @staticmethod
    def _described(thread: _Thread) -> str:
        guilty = thread.caller_of(thread.holder())
        return f"{'a callback' if guilty is None else guilty.name} blocks the event loop of user code in {thread.where()}"

    async def _free(self, thread: _Thread, holder: asyncio.Task[Any] | None) -> None:
        """Takes the loop from the task that has blocked it."""
        if thread.holder() is not holder:  # it has just given way
            thread.freeing = None
            return
        guilty, where = thread.caller_of(holder), thread.where()
        name = "a callback" if guilty is None else guilty.name
        thread.blame(guilty, f"blocks its event loop in {where}: await what takes long, or give it to asyncio.to_thread")
        thread.interrupt()
        yielded = await _any({thread.answer()}, _YIELD_S)
        self._freed, thread.freeing = time.monotonic(), None
        if yielded:
            _log.warning("%s blocked the event loop of user code in %s, and was interrupted", name, where)
            return
        self._given_up += 1
        _log.warning("%s blocks the event loop of user code in %s: its thread is given up (%d so far)", name, where, self._given_up)
        if thread is self._thread:
            self._thread = None
        thread.end()
        for call in thread.lose(f"has lost its event loop, which {name} blocked in {where}"):
            self._ready().begin(call)


async def _any(futures: set[asyncio.Future[None]], seconds: float) -> bool:
    """Whether one of them is done within so many seconds."""
    done, _ = await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


class _Call:
    """One call of user code, seen from both sides.

    `ended`, in the worker's loop, is done with it; all else is the thread's, while it has one.
    """

    def __init__(self, call: Callable[[], Awaitable[Any]], caller: Caller, ended: asyncio.Future[Any]) -> None:
        self.caller, self.ended = caller, ended
        self.thread: _Thread | None = None
        self.began = False
        self.blame: str | None = None
        self._call = call
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    def cancel(self) -> bool:
        """Whether it had been cancelled before."""
        before, self._cancelled = self._cancelled, True
        if self.thread is not None:
            self.thread.soon(self._cancel)
        return before

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """In the worker's loop. The first outcome counts."""
        if self.thread is not None:
            self.thread.calls.pop(self, None)
        settle(self.ended, result, error if self.blame is None else EnvironmentFailure(self.blame))

    def error(self) -> BaseException | None:
        """What it has raised, if it has."""
        if self._task is None or not self._task.done():
            return None
        return asyncio.CancelledError() if self._task.cancelled() else self._task.exception()

    # ---- in the thread

    def begin(self, thread: _Thread) -> None:
        if self.thread is not thread:  # it was given up, and has come back to itself
            return
        context = copy_context()
        context.run(_caller.set, self.caller)
        self._task = task = thread.loop.create_task(self._run(thread), context=context)
        task.add_done_callback(lambda _: self._report(thread))
        if self._cancelled:
            task.cancel()

    async def _run(self, thread: _Thread) -> None:
        if self.thread is not thread:  # given up since then
            raise asyncio.CancelledError
        self.began, self.caller.began = True, time.monotonic()
        result = await self._call()
        self._tell(thread, result, None)  # at once: a callback would come after the steps of others, which may take long

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _report(self, thread: _Thread) -> None:
        if (error := self.error()) is not None:
            self._tell(thread, None, error)

    def _tell(self, thread: _Thread, result: Any, error: BaseException | None) -> None:
        if self.thread is thread:
            with contextlib.suppress(RuntimeError):  # the worker's loop is closed: nobody waits
                self.ended.get_loop().call_soon_threadsafe(self.end, result, error)


class _Thread:
    """A thread with a loop. `calls`, `lost` and `freeing` are the worker's loop's."""

    def __init__(self) -> None:
        self.calls: dict[_Call, None] = {}  # in the order in which they were made
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.freeing: asyncio.Future[None] | None = None
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(self._task)
        self._callers: weakref.WeakKeyDictionary[asyncio.Task[Any], Caller | None] = weakref.WeakKeyDictionary()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="user code", daemon=True)
        self._thread.start()

    def begin(self, call: _Call) -> None:
        call.thread = self
        self.calls[call] = None
        self.soon(call.begin, self)

    def soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: it was given up, or the worker has closed
            self.loop.call_soon_threadsafe(function, *arguments)

    def answer(self) -> asyncio.Future[None]:
        """Done once the loop has come round."""
        home = asyncio.get_running_loop()
        answer: asyncio.Future[None] = home.create_future()

        def answered() -> None:
            with contextlib.suppress(RuntimeError):
                home.call_soon_threadsafe(lambda: answer.done() or answer.set_result(None))

        self.soon(answered)
        return answer

    def holder(self) -> asyncio.Task[Any] | None:
        """The task that is running."""
        return asyncio.current_task(self.loop)

    def caller_of(self, task: asyncio.Task[Any] | None) -> Caller | None:
        return None if task is None else self._callers.get(task)

    def where(self) -> str:
        """The line of user code that is being run: the innermost that is of no library."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = traceback.extract_stack(frame)
        own = [line for line in lines if not line.filename.startswith(_LIBRARIES) and line.filename != __file__]
        line = (own or lines)[-1]
        return f"{line.name} ({line.filename}:{line.lineno}: {line.line})"

    def blame(self, guilty: Caller | None, failure: str) -> None:
        """What the guilty caller has under way ends with this failure."""
        for call in self.calls:
            if call.began and call.caller is guilty:
                call.blame = failure
                call.cancel()

    def interrupt(self) -> None:
        """Takes effect with the next line of Python that the thread runs."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(_Interrupted))

    def lose(self, failure: str) -> list[_Call]:
        """Ends the calls that had begun with this failure. Returns the others, which may begin elsewhere, in their order."""
        calls, self.calls = tuple(self.calls), {}
        for call in calls:
            call.thread = None
            if call.began:
                call.end(error=call.error() or EnvironmentFailure(failure))
        self.lost.set_result(None)
        return [call for call in calls if not call.began]

    def end(self) -> None:
        """As soon as nothing holds it."""
        self._ends = True
        self.soon(self.loop.stop)

    # ---- in the thread

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(cast(Coroutine[Any, Any, Any], coroutine), loop=loop, **more)
        context = more.get("context")
        self._callers[task] = _caller.get() if context is None else context.get(_caller)
        return task

    def _run(self) -> None:
        while not self._ends:
            with contextlib.suppress(_Interrupted, SystemExit, KeyboardInterrupt):  # of a task, which has it as its outcome
                self.loop.run_forever()
        with contextlib.suppress(_Interrupted, SystemExit, KeyboardInterrupt):
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.loop.run_until_complete(asyncio.wait(left))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
