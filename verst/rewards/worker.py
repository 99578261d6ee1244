"""The process in which rewards run: `python -m verst.rewards.worker SOCKET_FD PARENT_PID`.

In (`verst.isolated.served`): first (`RewardSpec`, deadline), then (number, fields, trajectories). Out: first whether the reward loaded,
then for each request one reply when it begins and one for each trajectory as soon as it is scored, so that whoever waits knows what it
waits for. A plain reward takes one request after the other, an async one all that come. One that scores groups takes each request
whole, one after the other also if it is async.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from verst.errors import DeadlineExceeded, RewardFailure
from verst.extend import described, is_async, origin
from verst.fields import Score, checked, to_json
from verst.isolated.served import Channel, attempt
from verst.rewards.grouped import one_each, scores_groups
from verst.rewards.metrics import recording
from verst.types import Trajectory

_ERROR_CHARS = 500


class NotANumber(RewardFailure):
    """A reward returned something that cannot be a score."""


class Worker:
    """Serves one channel until it closes."""

    def __init__(self, channel: Channel) -> None:
        self._receive, self._send = channel.receive, channel.send
        self._send_unloaded = channel.send_unloaded
        self._runner = asyncio.Runner()  # one event loop for the worker's life: clients opened by an async reward stay usable

    def serve(self) -> None:
        """Loads the reward, says so, then scores what arrives. Returns when the parent closes the socket."""
        spec, self._deadline_s = self._receive()
        reward, error = attempt(spec.open)
        if error is not None:
            self._send_unloaded(error)
            return
        self._reward: Callable[..., Any] = reward
        self._grouped = scores_groups(reward)
        concurrent = is_async(reward) and not self._grouped
        self._send(concurrent=concurrent, grouped=self._grouped)
        with self._runner:
            if concurrent:
                self._runner.run(self._score_together())
                return
            score = self._score_group if self._grouped else self._score_in_order
            while (request := self._receive()) is not None:
                score(*request)

    def _score_in_order(self, number: int, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        self._send(number=number, begun=True)
        for index, trajectory in enumerate(trajectories):
            with recording() as recorded:
                reward, error = attempt(partial(self._score, trajectory, fields))
            self._report(number, index, recorded, reward, error)

    def _score_group(self, number: int, fields: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """In one call. What it records is of the group, so of each trajectory."""
        self._send(number=number, begun=True)
        with recording() as recorded:
            values, error = attempt(lambda: one_each(self._called(list(trajectories), fields), len(trajectories), "trajectories"))
        for index, trajectory in enumerate(trajectories):
            score, wrong = (None, error) if error is not None else attempt(partial(_scored, values[index], trajectory))
            self._report(number, index, recorded, score, wrong)

    def _score(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> Score:
        return _scored(self._called(trajectory, fields), trajectory)

    def _called(self, scored: Trajectory | list[Trajectory], fields: Mapping[str, Any]) -> Any:
        value = self._reward(scored, _copied(fields))
        if inspect.isawaitable(value):  # in this context: the runner has one of its own, in which nothing would be recorded
            value = self._runner.run(_wait_for(value), context=contextvars.copy_context())
        return value

    async def _score_together(self) -> None:
        """Async rewards mostly wait (for a judge, a sandbox), so all that have come wait at the same time."""
        loop, arrived, running = asyncio.get_running_loop(), asyncio.Queue[Any](), set[asyncio.Task[None]]()

        def receive() -> None:
            while (request := self._receive()) is not None:
                loop.call_soon_threadsafe(arrived.put_nowait, request)
            loop.call_soon_threadsafe(arrived.put_nowait, None)

        # a daemon, and a thread of its own: the reward may use up those of the loop, and the process may have to end in the middle
        threading.Thread(target=receive, daemon=True).start()
        while (request := await arrived.get()) is not None:
            number, fields, trajectories = request
            for index, trajectory in enumerate(trajectories):
                task = asyncio.create_task(self._score_one(number, index, trajectory, fields))
                running.add(task)
                task.add_done_callback(running.discard)

    async def _score_one(self, number: int, index: int, trajectory: Trajectory, fields: Mapping[str, Any]) -> None:
        self._send(number=number, begun=True)
        with recording() as recorded:
            scoring = asyncio.ensure_future(self._score_async(trajectory, fields))
        await asyncio.wait({scoring})
        error = RewardFailure("cancelled itself") if scoring.cancelled() else scoring.exception()
        self._report(number, index, recorded, scoring.result() if error is None else None, error)

    async def _score_async(self, trajectory: Trajectory, fields: Mapping[str, Any]) -> Score:
        limit = asyncio.timeout(self._deadline_s)
        try:
            async with limit:
                return _scored(await self._reward(trajectory, _copied(fields)), trajectory)
        except TimeoutError as error:
            if limit.expired():
                raise DeadlineExceeded(f"exceeded {self._deadline_s:g} s: make it faster, or raise reward.deadline_s") from error
            raise
        except SystemExit as leaving:  # now: the loop would cancel the others first, as if they had failed too
            sys.stdout.flush()
            os._exit(leaving.code if isinstance(leaving.code, int) else bool(leaving.code))

    def _report(self, number: int, index: int, recorded: Mapping[str, float], score: Score | None, error: BaseException | None) -> None:
        reply: dict[str, Any] = {"number": number, "index": index, "recorded": dict(recorded)}  # a thread of the reward may still record
        if error is None:
            assert score is not None
            self._send(**reply, reward=score.reward, fields=to_json(score.fields))
        else:
            self._send(**reply, error=_described(error), reason=_reason(error))


def _copied(value: Any) -> Any:
    """A copy of JSON values for one call: what a reward changes in it, the next one does not see."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def _scored(value: Any, trajectory: Trajectory) -> Score:
    if not isinstance(value, Score):
        return Score(_number(value))
    tokens = sum(int(one.loss_mask_T.sum()) for one in trajectory.sequences)
    fields = checked(value.fields, "its Score", RewardFailure, tokens=tokens)
    for name in fields:
        if name in trajectory.fields:
            raise RewardFailure(f"its Score: field {name!r} is there already, from the environment or a teacher: give it another name")
    return Score(_number(value.reward), fields)


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real | np.bool_):
        raise NotANumber(f"returned {described(value)}, not a number: return one")
    number = float(value)
    if not math.isfinite(number):
        raise NotANumber(f"returned {number}, not a finite number: return one")
    return number


def _described(error: BaseException) -> str:
    if isinstance(error, NotANumber | DeadlineExceeded):
        return str(error)[:_ERROR_CHARS]
    return (f"failed: {error}" if isinstance(error, RewardFailure) else f"raised {origin(error)}")[:_ERROR_CHARS]


def _reason(error: BaseException) -> str:
    if isinstance(error, NotANumber):
        return "not_a_number"
    return "deadline" if isinstance(error, DeadlineExceeded) else "exception"


if __name__ == "__main__":
    Worker(Channel.open()).serve()
