"""Many small calls to one actor as few messages.

A call through Ray costs a millisecond or so whatever it carries, and a step makes one for each group. So calls made in the same turn of the
event loop leave in one message, and one outstanding request collects whatever has finished since: a step then costs a handful of messages,
and a group that takes long still holds up no other.

    caller             takes a call             gives its answer      waits for
    sender             calls made so far        one `submit`          the first call of a turn
    collector          -                        answers by number     one `collect`, outstanding while calls are
    Inbox (actor)      submitted calls          finished answers      the first answer to finish
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from verst.errors import VerstError
from verst.runtime.wait import within


class Call(NamedTuple):
    """One call on its way to an actor. Method None takes the call of that number back: its caller waits no more."""

    number: int
    method: str | None
    args: tuple[Any, ...]


class Answer(NamedTuple):
    """What became of it: a result, or the error it raised."""

    number: int
    result: Any
    error: Exception | None


class _Answers:
    """What is ready for one mailbox."""

    def __init__(self) -> None:
        self.ready: list[Answer] = []
        self.some = asyncio.Event()


class Inbox:
    """The actor's side: runs submitted calls and keeps their answers until they are collected, by whoever made the calls.

    A caller's process may die with a `collect` outstanding here. What answers another caller must not leave with that one.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._answers: defaultdict[int, _Answers] = defaultdict(_Answers)
        self._running: dict[tuple[int, int], asyncio.Task[None]] = {}

    def submit(self, caller: int, calls: Sequence[Call]) -> None:
        for call in calls:
            key = caller, call.number
            if call.method is None:
                if key in self._running:
                    self._running[key].cancel()
                continue
            task = self._running[key] = asyncio.get_running_loop().create_task(self._run(call, self._answers[caller]))
            task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: tuple[int, int], _task: asyncio.Task[None]) -> None:
        del self._running[key]

    async def _run(self, call: Call, answers: _Answers) -> None:
        try:
            answer = Answer(call.number, await self._call(call.method, *call.args), None)
        except VerstError as error:
            answer = Answer(call.number, None, error)
        except Exception as error:  # noqa: BLE001 - a defect is its caller's; its type may not exist there, so its traceback travels
            answer = Answer(call.number, None, RuntimeError("".join(traceback.format_exception(error))))
        answers.ready.append(answer)
        answers.some.set()

    async def collect(self, caller: int, wait_s: float) -> list[Answer]:
        """All answers that are ready; waits up to `wait_s` for the first. Those that finish in the same turn come together."""
        answers = self._answers[caller]
        try:
            async with asyncio.timeout(wait_s):
                await answers.some.wait()
        except TimeoutError:
            return []
        await asyncio.sleep(0)
        ready, answers.ready = answers.ready, []
        answers.some.clear()
        return ready


class Mailbox:
    """The caller's side. `submit` and `collect` reach the `Inbox` of the actor `name`. One event loop."""

    COLLECT_S = 5.0
    SILENCE_S = 120.0
    """Beyond that: an actor answers even while it works, so one that does not is stuck, and all its calls fail."""

    def __init__(
        self, name: str, submit: Callable[[int, Sequence[Call]], Awaitable[None]], collect: Callable[[int, float], Awaitable[list[Answer]]]
    ) -> None:
        self._name, self._submit, self._collect = name, submit, collect
        self._caller = secrets.randbits(60)  # no other mailbox of this actor has it, in whichever process
        self._numbers = itertools.count()
        self._outgoing: list[Call] = []
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._collecting = False

    async def call(self, method: str, *args: Any) -> Any:
        """The answer to one call. Raises what it raised, or what broke the connection. If it is cancelled, so is the call in the actor."""
        loop = asyncio.get_running_loop()
        call = Call(next(self._numbers), method, args)
        answer = self._pending[call.number] = loop.create_future()
        self._post(call)
        if not self._collecting:
            self._collecting = True
            self._start(self._receive())
        try:
            return await answer
        except asyncio.CancelledError:
            self._post(Call(call.number, None, ()))
            raise
        finally:
            self._pending.pop(call.number, None)

    def _post(self, call: Call) -> None:
        self._outgoing.append(call)
        if len(self._outgoing) == 1:
            self._start(self._send())

    async def _send(self) -> None:
        await asyncio.sleep(0)  # let the calls of this turn come together
        calls, self._outgoing = self._outgoing, []
        await self._submit(self._caller, calls)

    async def _receive(self) -> None:
        try:
            while self._pending:
                limit_s = self.COLLECT_S + self.SILENCE_S
                answers = await within(self._collect(self._caller, self.COLLECT_S), limit_s, f"{self._name} to answer at all", idle=True)
                for number, result, error in answers:
                    answer = self._pending.get(number)
                    if answer is None or answer.done():
                        continue  # its caller has given up
                    if error is None:
                        answer.set_result(result)
                    else:
                        answer.set_exception(error)
        finally:
            self._collecting = False

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A sender or collector that failed takes every pending call with it: their answers would never come."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(error)
