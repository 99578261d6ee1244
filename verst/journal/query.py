"""Trajectories found in a journal: by reward, status, step, group and prompt. Reads; needs no cluster, no GPU and no model.

The journal may be growing meanwhile: what is complete when a query begins is what it sees.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verst.errors import DataError
from verst.fields import plain
from verst.journal.log import JournalReader
from verst.types import NO_VERSION, Branch, Group, Status, Trajectory


@dataclass(frozen=True, slots=True)
class Found:
    """One trajectory. `step` consumed its group (None: no step yet), or dropped it untrained, with the reason in `dropped`."""

    group: Group
    trajectory: Trajectory
    step: int | None
    dropped: str | None

    @property
    def mean_logprob(self) -> float | None:
        """Behaviour log-probability, mean over the sampled tokens; None if nothing was sampled."""
        found = np.concatenate([one.logprobs_T[one.versions_T != NO_VERSION] for one in self.trajectory.sequences])
        return float(found.mean()) if found.size else None

    @property
    def versions(self) -> tuple[int, int] | None:
        """The oldest and newest policy version that sampled a token of it."""
        sampled = np.concatenate([one.versions_T[one.versions_T != NO_VERSION] for one in self.trajectory.sequences])
        return (int(sampled.min()), int(sampled.max())) if sampled.size else None

    def described(self) -> dict[str, Any]:
        """As JSON values, without its token arrays."""
        t, prompt = self.trajectory, self.group.prompt
        return {
            "id": t.id,
            "group": self.group.seq,
            "step": self.step,
            "dropped": self.dropped,
            "status": str(t.status),
            "reward": t.reward,
            "error": t.error,
            "tokens": len(t.tokens_T),
            "generated_tokens": t.generated_tokens,
            "mean_logprob": self.mean_logprob,
            "versions": self.versions,
            "seed": t.seed,
            "prompt": {"id": prompt.id, "fields": dict(prompt.fields)},
            **_conversation(t),
            "branches": [{"tokens": len(branch.tokens_T), **_conversation(branch)} for branch in t.branches],
            "info": dict(t.info),
            "fields": {name: plain(value) for name, value in t.fields.items()},
        }


def _conversation(sequence: Trajectory | Branch) -> dict[str, Any]:
    turns = [{"generated_tokens": turn.end - turn.generated, "finish": str(turn.finish), "text": turn.text} for turn in sequence.turns]
    return {"messages": [{"role": m.role, "content": m.content} for m in sequence.messages], "turns": turns}


ORDERS: Mapping[str, Callable[[Found], Any]] = {
    "group": lambda found: (found.group.seq, int(found.trajectory.id.rpartition("/")[2])),
    "reward": lambda found: (found.trajectory.reward is None, found.trajectory.reward),
    "step": lambda found: (found.step is None, found.step),
    "tokens": lambda found: found.trajectory.generated_tokens,
    "logprob": lambda found: (found.mean_logprob is None, found.mean_logprob),
}
"""What found trajectories can be sorted by; unknown values come last."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; None leaves a thing open. Ranges include both ends."""

    rewards: tuple[float | None, float | None] = (None, None)
    statuses: frozenset[Status] = frozenset()
    steps: tuple[int | None, int | None] = (None, None)
    prompt: str | None = None
    """Part of the prompt's id or of one of its messages, in any case of letters."""
    group: int | None = None

    def admits_step(self, step: int | None) -> bool:
        return self.steps == (None, None) or (step is not None and _within(step, self.steps))

    def admits_prompt(self, group: Group) -> bool:
        if self.prompt is None:
            return True
        wanted = self.prompt.casefold()
        return any(wanted in text.casefold() for text in (group.prompt.id, *(m.content for m in group.prompt.messages)))

    def admits(self, trajectory: Trajectory) -> bool:
        if self.statuses and trajectory.status not in self.statuses:
            return False
        if self.rewards == (None, None):
            return True
        return trajectory.reward is not None and _within(trajectory.reward, self.rewards)


def select(journal: JournalReader, query: Query, *, newest_first: bool = False) -> Iterator[Found]:
    """The trajectories that a query admits, in order of admission or the other way. Decodes group by group, of admitted steps only.
    Groups that were given up are left out.

    Raises `DataError` if the group it asks for is not in the journal, `JournalError` if that was given up.
    """
    if query.group is not None and query.group not in journal.index.groups:
        raise DataError(f"{journal.directory} has no group {query.group}; it has {_span(sorted(journal.index.groups))}")
    for seq in sorted(journal.index.groups if query.group is None else [query.group], reverse=newest_first):
        step = journal.index.step_of(seq) or None
        if not query.admits_step(step) or (query.group is None and not journal.keeps(seq)):
            continue
        group = journal.group(seq)
        if query.admits_prompt(group):
            dropped = None if step is None else journal.batch(step).dropped.get(seq)
            members = reversed(group.trajectories) if newest_first else group.trajectories
            yield from (Found(group, t, step, dropped) for t in members if query.admits(t))


def last_of(journal: JournalReader, query: Query, *, order: str = "group", reverse: bool = False, limit: int = 0) -> list[Found]:
    """The last `limit` (0: all) of the trajectories that a query admits, sorted by one of `ORDERS`. Holds no more than those in memory."""
    if not limit:
        return sorted(select(journal, query), key=ORDERS[order], reverse=reverse)
    if order == "group":
        return list(itertools.islice(select(journal, query, newest_first=not reverse), limit))[::-1]
    few = heapq.nsmallest if reverse else heapq.nlargest
    return few(limit, select(journal, query), key=ORDERS[order])[::-1]


def find_trajectory(journal: JournalReader, name: str) -> Found:
    """The trajectory called GROUP/MEMBER. Raises `DataError` that says what there is."""
    seq, _, member = name.partition("/")
    if not (seq.isdecimal() and member.isdecimal()):
        raise DataError(f"trajectory {name!r}: the id of a trajectory is GROUP/MEMBER, such as 12/3")
    members = list(select(journal, Query(group=int(seq))))
    for found in members:
        if found.trajectory.id == name:
            return found
    raise DataError(f"group {seq} has no trajectory {name}; it has {', '.join(found.trajectory.id for found in members)}")


def token_rows(sequence: Trajectory | Branch, decode: Callable[[int], str | None]) -> list[dict[str, Any]]:
    """One row a token: its place, id, text, log-probability, policy version (None where it was given) and whether the loss reads it."""
    rows = []
    for place, token in enumerate(sequence.tokens_T.tolist()):
        version = int(sequence.versions_T[place])
        sampled = version != NO_VERSION
        rows.append(
            {
                "place": place,
                "token": token,
                "text": decode(token),
                "logprob": float(sequence.logprobs_T[place]) if sampled else None,
                "version": version if sampled else None,
                "in_loss": bool(sequence.loss_mask_T[place]),
            }
        )
    return rows


def _within(value: float, limits: tuple[float | None, float | None]) -> bool:
    low, high = limits
    return (low is None or value >= low) and (high is None or value <= high)


def _span(seqs: Sequence[int]) -> str:
    return f"groups {seqs[0]} to {seqs[-1]}" if seqs else "none yet"
