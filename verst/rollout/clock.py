"""The time of trajectories, which stands still while the engine is paused for a new version: nobody can do anything then."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Clock:
    """Goes from the beginning. All methods belong to one event loop."""

    def __init__(self) -> None:
        self.going = True
        self.limits: set[Limit] = set()

    def stop(self) -> None:
        """Repeating it changes nothing."""
        self.going = False
        for limit in self.limits:
            limit.hold()

    def go(self) -> None:
        """Repeating it changes nothing."""
        self.going = True
        for limit in self.limits:
            limit.run()

    def limit(self, seconds: float | None) -> Limit:
        """As `asyncio.timeout`, of this clock's seconds."""
        return Limit(self, seconds)


class Limit:
    """Raises `TimeoutError` out of an `async with` that lasts longer than so many seconds (None: for ever) in which its clock goes."""

    def __init__(self, clock: Clock, seconds: float | None) -> None:
        self._clock, self._left_s = clock, seconds
        self._timeout = asyncio.timeout(None)

    def expired(self) -> bool:
        return self._timeout.expired()

    async def __aenter__(self) -> Limit:
        await self._timeout.__aenter__()
        if self._left_s is not None:
            self._clock.limits.add(self)
        if self._clock.going:
            self.run()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._clock.limits.discard(self)
        return await self._timeout.__aexit__(kind, error, traceback)

    def hold(self) -> None:
        """Its clock stands."""
        ends = self._timeout.when()
        if ends is not None and not self.expired():
            self._left_s = ends - asyncio.get_running_loop().time()
            self._timeout.reschedule(None)

    def run(self) -> None:
        """Its clock goes."""
        if self._left_s is not None and self._timeout.when() is None:
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._left_s)
