"""Over-sampling with an early cut: of the trajectories of one prompt so many are wanted, and the last to end are cut.

A long tail holds up its whole group. Rolling a few more than are needed and ending the rest once enough have ended bounds that wait by the
members that are not the slowest. It favours short answers, so what is cut is counted with its tokens (`Group.cut`), and
`verst.runtime.bias` shows what that does to what is trained.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from verst.rollout.recorded import Recorded
from verst.types import FinishReason, GenerateRequest, Generation

T = TypeVar("T")

_LAST_S = 1.0
"""What a call that is cancelled may take to notice. One that does not is left to its own limit."""


class Cut(Exception):
    """Enough others have ended: not an error, but how a trajectory that is not needed any more ends."""


class Race:
    """The `members` of one group, of which `wanted` may end by themselves."""

    def __init__(self, engine: Recorded, wanted: int, members: int) -> None:
        self._engine = engine
        self._left = wanted
        self._cuts = members > wanted
        self._over = asyncio.Event()
        self._asked: set[str] = set()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    async def generate(self, request: GenerateRequest) -> Generation:
        """As the engine's; what comes back aborted after the race is over was cut. Raises `Cut` if it is over already."""
        if self.over:
            raise Cut
        self._asked.add(request.id)
        try:
            return await self._engine.generate(request)
        finally:
            self._asked.discard(request.id)

    def is_cut(self, generation: Generation) -> bool:
        return self.over and generation.finish is FinishReason.ABORT

    async def unless_over(self, call: Awaitable[T]) -> T:
        """Awaits an environment. Cancels the call and raises `Cut` once the race is over."""
        if not self._cuts:
            return await call
        task, over = asyncio.ensure_future(call), asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Cut
            return task.result()
        finally:
            over.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_LAST_S)

    async def ended(self) -> bool:
        """One more has ended by itself. Whether it is wanted: the last one that is has what the others are doing ended too."""
        if self.over:
            return False
        self._left -= 1
        if self._left == 0 and self._cuts:
            self._over.set()
            if self._asked:
                await self._engine.abort(sorted(self._asked))
        return True
