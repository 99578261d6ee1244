"""The parent's end of a worker that scores many trajectories at a time: that of an async reward, which mostly waits for others.

Who waits for whom: each trajectory for its own reply, and one reader for the next reply of any. The worker keeps each deadline itself, so
one that says nothing for longer than a deadline, while trajectories are with it, is stuck.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from verst.rewards.process import Death, RewardProcess
from verst.types import Trajectory

AT_ONCE = 64
"""Trajectories that one worker scores at a time: as many calls as a service usually takes from one client."""

_UNREADABLE = Death("crash", "broke: what its process answered cannot be read", began=True)


class SharedProcess:
    """`lost` is called, once, when the worker cannot be used any more, before those who wait for it learn of that."""

    def __init__(self, process: RewardProcess, lost: Callable[[RewardProcess], None]) -> None:
        self._process, self._lost = process, lost
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Mapping[str, Any] | Death]] = {}
        self._begun: set[int] = set()
        self._reading: asyncio.Task[None] | None = None
        self._dead = False

    @property
    def busy(self) -> int:
        """Trajectories that are with it."""
        return len(self._asked)

    def usable(self) -> bool:
        """Whether it can be given another one. A worker that died idle is given up here."""
        if not self._dead and not self.busy and not self._process.alive:
            self._give_up()
        return not self._dead

    async def score(self, fields: Mapping[str, Any], trajectory: Trajectory) -> Mapping[str, Any] | Death:
        """The worker's reply; or how it died, with this trajectory begun or not."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        try:
            await self._process.request(number, fields, [trajectory])
            return await answer
        finally:
            self._asked.pop(number, None)
            self._begun.discard(number)

    async def _read(self) -> None:
        death = _UNREADABLE
        try:
            while self._asked:
                reply = await self._process.reply()
                if isinstance(reply, Death):
                    death = reply
                    if self._asked or death.reason != "deadline":  # one that was asked for nothing owes no reply
                        self._give_up()
                    return
                self._take(reply)
        finally:  # also after a defect: nobody else would tell those who wait
            if self._asked:
                self._give_up()
            for number, answer in self._asked.items():
                if not answer.done():
                    answer.set_result(death._replace(began=number in self._begun))

    def _take(self, reply: Mapping[str, Any]) -> None:
        number = reply["number"]
        answer = self._asked.get(number)
        if answer is None or answer.done():
            return  # whoever asked has gone
        if "begun" in reply:
            self._begun.add(number)
        else:
            del self._asked[number]
            answer.set_result(reply)

    def _give_up(self) -> None:
        if not self._dead:
            self._dead = True
            self._lost(self._process)
