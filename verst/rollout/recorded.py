"""What was generated of a group, so that another replica can go on from it if this one is lost.

What an engine generates for a request is kept under the request's id, with the digest of what it asked. A group that is rolled again asks
for the same as long as its environments answer alike. What is known of it is given back at once; a generation that was under way comes back
as if it had been aborted, so it is continued from its tokens. An environment that answers otherwise leads to other tokens, of which nothing
is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from verst.protocols import Engine
from verst.routing.records import tokens_digest
from verst.types import FinishReason, GenerateRequest, Generation


@dataclass(frozen=True, slots=True)
class Piece:
    """What was generated for one request: all of it, or, as if it had been aborted, what there was of it so far."""

    asked: str
    """What the request asked; see `_digest`."""
    generation: Generation


class Recorded:
    """One group's requests to an engine, and what came of them."""

    def __init__(self, engine: Engine, known: Iterable[Piece] = ()) -> None:
        """`known`: what another replica had of this group."""
        self._engine = engine
        self._pieces = {piece.generation.id: piece for piece in known}
        self._told = {name: len(piece.generation.tokens_T) for name, piece in self._pieces.items()}
        self._asked: dict[str, str] = {}

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`; at once, where it is known."""
        asked = _digest(request)
        known = self._pieces.get(request.id)
        if known is not None and known.asked == asked:
            return known.generation
        self._asked[request.id] = asked
        generation = await self._engine.generate(request)
        self._keep(asked, generation)
        return generation

    async def abort(self, ids: Sequence[str]) -> None:
        await self._engine.abort(ids)

    def news(self, in_flight: Mapping[str, Generation]) -> list[Piece]:
        """What has come since this was last asked. `in_flight`: by id, what the engine has of the requests that it works on."""
        self._note(in_flight)
        fresh = [piece for name, piece in self._pieces.items() if len(piece.generation.tokens_T) > self._told.get(name, 0)]
        self._told |= {piece.generation.id: len(piece.generation.tokens_T) for piece in fresh}
        return fresh

    def all(self, in_flight: Mapping[str, Generation]) -> list[Piece]:
        """Everything that is known."""
        self._note(in_flight)
        return list(self._pieces.values())

    def _note(self, in_flight: Mapping[str, Generation]) -> None:
        for name in self._asked.keys() & in_flight.keys():
            self._keep(self._asked[name], replace(in_flight[name], finish=FinishReason.ABORT))

    def _keep(self, asked: str, generation: Generation) -> None:
        if len(generation.tokens_T):
            self._pieces[generation.id] = Piece(asked, generation)


def _digest(request: GenerateRequest) -> str:
    """Of its tokens, limit and stop strings, which a rollout function may choose.

    What was generated under others is longer or shorter than was asked for, or goes on behind a stop. Such a piece is not cut to fit but
    generated anew: a cut one would need its routes and the stop's place within a token cut as the engine does it.
    """
    return f"{tokens_digest(request.tokens_T)} {request.sampling.max_new_tokens} {request.sampling.stop!r}"
