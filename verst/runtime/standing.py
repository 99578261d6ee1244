"""Where a run stands, in a few lines: what it tells when a deadline ends it, and when it waits for longer than it should.

Made of what the loop and its replicas know of their waits (`verst.observe.waits`).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from verst.errors import DeadlineExceeded
from verst.observe.waits import Wait, Waits
from verst.runtime.pools import Replicas
from verst.runtime.slots import GroupSlots
from verst.runtime.wait import explained_by, kept_waits

_KINDS = 12
"""Lines of one part: a run may hold thousands of groups, of which most wait for the same few things."""

_NUMBERS = 5

_LONG_WAIT_S = 30.0
_LONG_WAIT_TIMES = 10
"""A step that waits for its groups longer than this many times what is usual, and than the seconds before, is worth a line."""

Held = Mapping[int, tuple[str, float]]
"""Of each group: what it waits for, and for how many seconds."""


class Standing:
    """Keeps what the parts of a loop and its groups wait for. The loop says what it does with a group; a replica says what it does."""

    def __init__(self, slots: GroupSlots, replicas: Replicas, keep_stacks: Callable[[str], Awaitable[list[str]]]) -> None:
        """`keep_stacks` writes what all processes do, for the reason given, and returns the line that says where."""
        self._slots, self._replicas = slots, replicas
        self._keep_stacks = keep_stacks
        self._waits = Waits()
        self._groups = Waits()
        self._told: asyncio.Task[list[str]] | None = None  # where everything stood when a deadline ended the run
        self._recent_s: deque[float] = deque(maxlen=20)

    def keep_waits(self) -> None:
        """From here on also the waits with a deadline (`verst.runtime.wait`) of this task and of those that it starts."""
        self._waits = kept_waits()

    def feed(self, awaited: str) -> None:
        self._waits.begin("the feed", awaited)

    def group(self, seq: int, awaited: str) -> None:
        """What a group waits for from now on, unless it is on a replica."""
        self._groups.begin(seq, awaited)

    def freed(self, seq: int) -> None:
        self._groups.end(seq)

    def waited(self, seconds: float) -> None:
        """A step has waited for its groups."""
        self._recent_s.append(seconds)

    async def lines(self) -> list[str]:
        """Who waits for whom now."""
        return standing_lines(self._waits.now(), await self._held(), self._slots.capacity)

    async def told(self, reason: str) -> list[str]:
        """The same, and where the stacks of all processes are written, whatever fails of it."""
        lines, kept = await asyncio.gather(explained_by(self.lines(), _untold), self._keep_stacks(reason))
        return [*lines, *kept]

    async def explained(self, part: Callable[[], Awaitable[None]]) -> None:
        """Does a part of the loop. A deadline that ends it, and the run, tells who waits for whom, while all others still stand there."""
        try:
            await part()
        except DeadlineExceeded as error:
            if self._told is None:
                self._told = asyncio.create_task(self.told("a deadline passed"))
            lines = await asyncio.shield(self._told)
            if lines[0] not in str(error):  # several may wait for the part that it ends
                error.args = ("\n".join([str(error), *lines]),)
            raise

    async def tell_of_a_long_wait(self, step: int, tell: Callable[[str], None]) -> None:
        """One line, long before a deadline, on what a step waits for that waits much longer for its groups than those before."""
        if len(self._recent_s) < 3:
            return
        begun, usual_s = time.monotonic(), statistics.median(self._recent_s)
        await asyncio.sleep(max(_LONG_WAIT_S, _LONG_WAIT_TIMES * usual_s))
        lines = "; ".join(group_lines(await self._held())[:3])
        tell(f"step {step} has waited for its groups for {time.monotonic() - begun:.0f} s (usually {usual_s:.1f} s): {lines}")

    async def _held(self) -> Held:
        """What each group that holds a slot waits for."""
        on_replicas = await self._replicas.standing()
        own = {wait.key: (wait.awaited, wait.seconds) for wait in self._groups.now()}
        return {seq: on_replicas.get(seq) or own.get(seq, ("a replica", 0.0)) for seq in self._slots.seqs}


def _untold(error: Exception) -> list[str]:
    return [f"who waits for whom could not be told: {type(error).__name__}: {error}"]


def standing_lines(waits: Sequence[Wait], held: Held, capacity: int) -> list[str]:
    """Who waits for whom. `held`: the groups that hold one of the `capacity` slots."""
    said = list(dict.fromkeys(_waiter(wait) for wait in waits))
    longest = {who: max(w.seconds for w in waits if _waiter(w) == who) for who in said[:_KINDS]}
    lines = ["who waits for whom:"]
    lines += [f"  {who} ({seconds:.1f} s)" for who, seconds in longest.items()]
    if len(said) > _KINDS:
        lines.append(f"  and {len(said) - _KINDS} more")
    lines.append(f"  {len(held)} of {capacity} group slots are held" + (":" if held else ""))
    kinds = group_lines(held)
    lines += [f"    {line}" for line in kinds[:_KINDS]]
    if len(kinds) > _KINDS:
        lines.append(f"    and {len(kinds) - _KINDS} more kinds of wait")
    return lines


def group_lines(held: Held) -> list[str]:
    """One line for each thing that groups wait for: the longest wait first."""
    kinds: dict[str, list[int]] = {}
    for seq, (awaited, _) in sorted(held.items(), key=lambda item: -item[1][1]):
        kinds.setdefault(awaited, []).append(seq)
    return [_group_line(awaited, seqs, held[seqs[0]][1]) for awaited, seqs in kinds.items()]


def _group_line(awaited: str, seqs: Sequence[int], seconds: float) -> str:
    if len(seqs) == 1:
        return f"group {seqs[0]} waits for {awaited} ({seconds:.1f} s)"
    numbers = ", ".join(map(str, sorted(seqs)[:_NUMBERS])) + (", …" if len(seqs) > _NUMBERS else "")
    return f"{len(seqs)} groups wait for {awaited} (up to {seconds:.1f} s): {numbers}"


def _waiter(wait: Wait) -> str:
    """Those without a name of their own are the loop's parts, of which many may wait for one thing."""
    return f"{wait.key if isinstance(wait.key, str) else 'the loop'} waits for {wait.awaited}"
