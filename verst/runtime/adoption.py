"""A loop that starts where another one died, with processes that still live: they are adopted, and what they had finished is kept.

    trainer ranks      give up what they do, and are rebuilt in their processes; their state comes from the snapshots
    snapshot holders   go on as they are
    replicas           hand over the groups that they had finished, which go into the journal, and the tokens of those in flight, which
                       are rolled again from there; those adopted keep their engines

Where trainer and replicas share devices nobody is adopted: their turn is not known, and with it who has the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from verst.errors import VerstError
from verst.journal.codec import decode_group
from verst.journal.log import Journal
from verst.rollout.recorded import Piece
from verst.runtime.actors import Worker
from verst.runtime.replica import Replica
from verst.runtime.rollout_worker import Adopted
from verst.runtime.wait import within
from verst.types import NO_VERSION

_ANSWER_S = 20.0
"""Within which a process answers that may be in the middle of starting."""


async def adopt_replicas(left: Mapping[int, Worker], count: int) -> tuple[list[Replica], list[Adopted]]:
    """At most `count` of those that an earlier loop has left, the newest of each slot, and what each one had that answered.

    The others are ended.
    """
    answers = await asyncio.gather(*map(_asked, left.values()))
    replicas: dict[int, Replica] = {}
    for number, answer in zip(left, answers, strict=True):
        if answer is not None and answer.started:
            replicas[answer.slot] = Replica(number, left[number], slot=answer.slot, started=True)
    chosen = sorted(replicas.values(), key=lambda replica: -replica.number)[:count][::-1]
    for number in left.keys() - {replica.number for replica in chosen}:
        left[number].kill()
    return chosen, [answer for answer in answers if answer is not None]


async def _asked(worker: Worker) -> Adopted | None:
    try:
        return await within(worker.call("adopt"), _ANSWER_S, f"{worker.name}: adopt")
    except VerstError:  # it is dead, or stuck: another one takes its place
        return None


def complete(adopted: Sequence[Replica], count: int, spawn: Callable[[int, int], Worker]) -> list[Replica]:
    """As many replicas as the run has, those that are missing new."""
    used = {replica.slot for replica in adopted}
    first = max((replica.number for replica in adopted), default=-1) + 1
    free = [slot for slot in range(count + len(used)) if slot not in used][: count - len(adopted)]
    new = [Replica(first + i, spawn(first + i, slot), slot=slot) for i, slot in enumerate(free)]
    return [*adopted, *new]


def keep_finished(journal: Journal, adopted: Sequence[Adopted]) -> int:
    """Groups that were finished when the loop died go into the journal. Returns how many.

    Not those with tokens of a version that was not compared with the trainer yet: they are rolled again.
    """
    index, kept = journal.index, 0
    for payload in (payload for replica in adopted for payload in replica.finished):
        group = decode_group(payload)
        known = group.seq in index.admitted and group.seq not in index.groups
        if known and all(_verified(journal, one.versions_T) for trajectory in group.trajectories for one in trajectory.sequences):
            journal.append_group(group.seq, payload)
            kept += 1
    return kept


def still_in_flight(journal: Journal, adopted: Sequence[Adopted]) -> dict[int, list[Piece]]:
    """What was generated of groups in flight when the loop died, but for tokens of a version that was not compared with the trainer yet."""
    index, found = journal.index, dict[int, list[Piece]]()
    for seq, pieces in (item for replica in adopted for item in replica.in_flight.items()):
        if seq in index.admitted and seq not in index.groups:
            found[seq] = [piece for piece in pieces if _verified(journal, piece.generation.versions_T)]
    return found


def _verified(journal: Journal, versions_T: NDArray[np.int32]) -> bool:
    return int(versions_T.max(initial=NO_VERSION)) < journal.index.published.end
