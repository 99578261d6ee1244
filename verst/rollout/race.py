"""Over-sampling with an early cut: of the trajectories of one prompt so many are wanted, and the last to end are cut.

A long tail holds up its whole group. Rolling a few more than are needed and ending the rest once enough have ended bounds that wait by the
members that are not the slowest. It favours short answers, so what is cut is counted with its tokens (`Group.cut`), and
`verst.runtime.bias` shows what that does to what is trained.
"""

from __future__ import annotations

from verst.protocols import Engine
from verst.types import FinishReason, GenerateRequest, Generation


class Cut(Exception):
    """Enough others have ended: not an error, but how a trajectory that is not needed any more ends."""


class Race:
    """The members of one group, of which `wanted` may end by themselves."""

    def __init__(self, engine: Engine, wanted: int) -> None:
        self._engine = engine
        self._left = wanted
        self._asked: set[str] = set()

    @property
    def over(self) -> bool:
        return self._left <= 0

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

    async def ended(self) -> None:
        """One more has ended by itself. The last one that was wanted has what the others are generating ended too.

        A member that waits for its environment ends when that has replied.
        """
        self._left -= 1
        if self._left == 0 and self._asked:
            await self._engine.abort(sorted(self._asked))
