"""What a timeline is made of, and how it is read from a run's directory.

Every process of the run writes lines of its own session, whose times count from its beginning. A reader puts the sessions one after the
other and leaves out the time between them, in which nothing ran: so clocks that were set, or differ, cannot make two sessions overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from verst.errors import ConfigError
from verst.observe.intervals import Interval
from verst.observe.tail import LineTail
from verst.types import NO_VERSION


def _moved(time: float, by: float) -> float:
    return round(time + by, 6)  # microseconds, which is what traces are in


class Phase(NamedTuple):
    """A part of a step, as `Spans` timed it."""

    name: str
    began: float
    ended: float


class StepTime(NamedTuple):
    """One step.

    took: the admission numbers of the groups that it consumed, the dropped ones included.
    replicas: the numbers of those that there were. None if groups are not generated but demonstrated.
    """

    step: int
    began: float
    ended: float
    phases: tuple[Phase, ...]
    took: tuple[int, ...]
    replicas: tuple[int, ...]

    def of(self, *names: str) -> list[Interval]:
        """The intervals of these phases."""
        return [(phase.began, phase.ended) for phase in self.phases if phase.name in names]

    @property
    def trained_again(self) -> bool:
        """From its journaled batch, after a restart: it waited for no group."""
        return all(phase.name != "rollout" for phase in self.phases)

    def shifted(self, by: float) -> StepTime:
        phases = tuple(Phase(p.name, _moved(p.began, by), _moved(p.ended, by)) for p in self.phases)
        return self._replace(began=_moved(self.began, by), ended=_moved(self.ended, by), phases=phases)


class GroupLife(NamedTuple):
    """One group at a replica: posted, then generated from `began` until `scoring`, then scored until it `ended`.

    `seq` < 0: of an evaluation. Of one that had not come back when the session ended nothing more is known: it counts as being generated
    until then, and has `NO_VERSION`.

    The replica tells how long it generated and scored, and the loop when it posted and got the group: no two clocks are compared. What
    neither covers lies before `began`: the way there and back, and the wait for a new version, where groups do not run through one.
    """

    seq: int
    prompt: str
    replica: int
    posted: float
    began: float
    scoring: float
    ended: float
    tokens: int
    """Generated, of all its trajectories."""
    oldest: int
    """Policy version when it began."""
    newest: int

    @property
    def came_back(self) -> bool:
        return self.oldest != NO_VERSION

    @property
    def generation(self) -> Interval:
        return self.began, self.scoring

    @property
    def scored(self) -> Interval:
        return self.scoring, self.ended

    def until(self, now: float) -> GroupLife:
        """Of one that is in flight."""
        return self._replace(scoring=now, ended=now)

    def shifted(self, by: float) -> GroupLife:
        times = {name: _moved(getattr(self, name), by) for name in ("posted", "began", "scoring", "ended")}
        return self._replace(**times)


class Pull(NamedTuple):
    """A version on its way into the engines. The trainer sends from `sending` until `sent`: the same if the engines read files."""

    version: int
    began: float
    ended: float
    sending: float
    sent: float

    def shifted(self, by: float) -> Pull:
        return Pull(self.version, *(_moved(time, by) for time in self[1:]))


class Session(NamedTuple):
    """One process of the run: where it begins on the time axis, and when that was, in seconds since 1970 by its machine's clock."""

    began: float
    at: float


@dataclass(frozen=True)
class Recorded:
    """A timeline on one axis: seconds in which the run lived."""

    sessions: Sequence[Session]
    steps: Sequence[StepTime]
    groups: Sequence[GroupLife]
    pulls: Sequence[Pull]

    @property
    def replicas(self) -> list[int]:
        """The numbers of all that there were."""
        return sorted({number for step in self.steps for number in step.replicas} | {life.replica for life in self.groups})

    def of_steps(self, first: int | None, last: int | None) -> Recorded:
        """These steps (None: no limit), and what happened at the same time. Raises `ConfigError` if there are none."""
        steps = [s for s in self.steps if (first is None or s.step >= first) and (last is None or s.step <= last)]
        if not steps:
            known = [s.step for s in self.steps]
            has = f"steps {min(known)} to {max(known)}" if known else "no step yet"
            raise ConfigError(f"no step of that range is in the timeline, which has {has}")
        began, ended = steps[0].began, max(s.ended for s in steps)
        return Recorded(
            [s for s in self.sessions if began <= s.began <= ended],
            steps,
            [g for g in self.groups if g.posted < ended and g.ended > began],
            [p for p in self.pulls if p.began < ended and p.ended > began],
        )

    def newest(self, count: int) -> Recorded:
        """The last so many steps. Raises `ConfigError` if there are none."""
        return self.of_steps(max((s.step for s in self.steps), default=0) - count + 1, None)


def older(path: Path) -> Path:
    """Where the former lines of a timeline lie, once there were many."""
    return path.with_suffix(f".1{path.suffix}")


def read_timeline(path: Path) -> Recorded:
    """Everything that a run has recorded. A line that a crash cut short, or that is no line of a timeline, is skipped.

    Raises `ConfigError` if nothing was recorded.
    """
    parts: dict[float, _Session] = {}
    current: _Session | None = None
    for row in (row for file in (older(path), path) for row in _rows(file)):
        if "session" in row:
            current = parts.setdefault(row["session"], _Session(row["session"]))
        elif current is not None:
            current.add(row)
    if not parts:
        raise ConfigError(f"{path} has no timeline: it begins with a run's first step, and runs of older versions of Verst have none")
    return _joined(list(parts.values()))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in LineTail(path).read():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and ("session" in row or {"groups", "posted", "pulls"} <= row.keys()):
            yield row


class _Session:
    """What one process wrote, in its own time."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.steps: list[StepTime] = []
        self.groups: list[GroupLife] = []
        self.pulls: list[Pull] = []
        self._in_flight: dict[tuple[int, float], GroupLife] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        if "step" in row:
            phases = tuple(Phase(*phase) for phase in row["phases"])
            self.steps.append(StepTime(row["step"], row["began"], row["ended"], phases, tuple(row["took"]), tuple(row["replicas"])))
        ended = [GroupLife(*life) for life in row["groups"]]
        self.groups += ended
        self._in_flight |= {(life.seq, life.posted): life for life in (GroupLife(*posted) for posted in row["posted"])}
        for life in ended:
            self._in_flight.pop((life.seq, life.posted), None)
        self.pulls += [Pull(*pull) for pull in row["pulls"]]

    @property
    def ended(self) -> float:
        return max((x.ended for x in (*self.steps, *self.groups, *self.pulls)), default=0.0)

    @property
    def lives(self) -> list[GroupLife]:
        """Of all its groups."""
        return [*self.groups, *(life.until(self.ended) for life in self._in_flight.values())]


def _joined(sessions: Sequence[_Session]) -> Recorded:
    steps: list[StepTime] = []
    groups: list[GroupLife] = []
    pulls: list[Pull] = []
    begun: list[Session] = []
    zero = 0.0
    for session in sessions:
        begun.append(Session(zero, session.at))
        steps += [step.shifted(zero) for step in session.steps]
        groups += [group.shifted(zero) for group in session.lives]
        pulls += [pull.shifted(zero) for pull in session.pulls]
        zero += session.ended
    return Recorded(begun, steps, groups, pulls)
