"""Every wait has a deadline that names who was awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import TypeVar

from verst.errors import DeadlineExceeded, VerstError
from verst.observe.waits import Waits

T = TypeVar("T")

GRACE_S = 10.0
"""How long the others may still take once a call has failed: time to notice that a peer is gone, where they can notice it."""


class NoAnswer(DeadlineExceeded):
    """The limit of a wait of this process has passed; not one that somebody else tells of."""


_WAITS: ContextVar[Waits | None] = ContextVar("waits", default=None)


def kept_waits() -> Waits:
    """A table in which every wait of this task, and of those that it starts from here on, stands while it lasts."""
    waits = Waits()
    _WAITS.set(waits)
    return waits


async def within(awaitable: Awaitable[T], deadline_s: float, who: str, *, idle: bool = False) -> T:
    """Awaits for at most `deadline_s` seconds. `idle`: a wait that says nothing about what the run stands still for.

    Raises:
        NoAnswer: a `DeadlineExceeded` that names `who` (for example "trainer rank 1: optimizer_step") and the limit.
    """
    limit = asyncio.timeout(deadline_s)
    waits, key = None if idle else _WAITS.get(), object()
    if waits is not None:
        waits.begin(key, who)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise  # a time-out of the awaited code itself, not of this wait
        raise NoAnswer(f"waited {deadline_s:g} s for {who}") from None
    finally:
        if waits is not None:
            waits.end(key)


async def explained_by(asking: Awaitable[T], otherwise: Callable[[Exception], T]) -> T:
    """What is asked only to explain an error, or what `otherwise` makes of it that this failed: nothing may take the error's place."""
    try:
        return await asking
    except Exception as error:  # noqa: BLE001 - of any kind: a deadline, a death, a defect in another process
        return otherwise(error)


async def gather_named(calls: Mapping[str, Awaitable[T]], *, grace_s: float = GRACE_S) -> list[T]:
    """Runs calls together, each with a deadline of its own, and returns their answers in order. None is left running behind an error.

    The peers of a rank that failed may be inside a collective, which ends only by the limit of the process group. So after the first
    failure the others have `grace_s` seconds, then they are given up.

    Raises:
        The first failure, or the first `VerstError` there is: a diagnosis says more than the broken connection that a peer may report
        before it. Those who did not answer are named in its message, or in a note if it is not a `VerstError`.
    """
    tasks: dict[asyncio.Future[T], str] = {asyncio.ensure_future(call): who for who, call in calls.items()}
    if not tasks:
        return []
    running = set(tasks)
    try:
        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        failures = _failures(tasks, ended)
        if running:
            late, running = await asyncio.wait(running, timeout=grace_s)
            failures += _failures(tasks, late)
        if failures:
            raise _told(failures, [tasks[task] for task in tasks if task in running], grace_s)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def outcomes(calls: Mapping[str, Awaitable[T]], *, grace_s: float | None = None) -> list[T | VerstError]:
    """Runs calls together, each with a deadline of its own; what each of them returned or, of diagnoses, raised, in order.

    `grace_s`: for how long the others are waited for once one of them has failed; those who did not answer by then have `NoAnswer`. Raises
    what is no diagnosis.
    """
    tasks: dict[asyncio.Future[T], str] = {asyncio.ensure_future(call): who for who, call in calls.items()}
    running = set(tasks)
    try:
        while running:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if grace_s is not None and _failures(tasks, ended):
                _, running = await asyncio.wait(running, timeout=grace_s) if running else (set(), running)
                break
        return [_outcome(task, who) for task, who in tasks.items()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(task: asyncio.Future[T], who: str) -> T | VerstError:
    if not task.done():
        return NoAnswer(f"{who}: no answer, after another one had failed")
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, VerstError):
        return error
    raise error


def _failures(tasks: Mapping[asyncio.Future[T], str], ended: set[asyncio.Future[T]]) -> list[BaseException]:
    return [error for task in tasks if task in ended and (error := task.exception()) is not None]


def _told(failures: list[BaseException], silent: list[str], grace_s: float) -> BaseException:
    error = next((e for e in failures if isinstance(e, VerstError)), failures[0])
    if silent:
        missing = f"{', '.join(silent)}: no answer within {grace_s:g} s after that"
        if isinstance(error, VerstError):
            error.args = (f"{error} ({missing})",)  # the command line shows messages, not notes
        else:
            error.add_note(missing)
    return error
