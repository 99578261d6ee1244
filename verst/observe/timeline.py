"""The timeline of a run as it goes on: who worked when, kept until it is written with the row of the next step.

In memory is what has happened since the last row; on disk at most two files of `_FILE_BYTES`, of which the older one goes first. A disk
that does not take it ends the timeline, not the run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verst.errors import VerstError
from verst.observe.idle import shares
from verst.observe.intervals import Interval, common, total
from verst.observe.outliers import replica_paces, slowest
from verst.observe.recorded import GroupLife, Phase, Pull, StepTime, older
from verst.observe.sinks import JsonlSink
from verst.observe.spans import Spans
from verst.types import NO_VERSION, Group

_FILE_BYTES = 32 << 20
"""A step of 16 groups takes some 3 KB: so many bytes are some ten thousand steps."""
_KEPT = 1 << 16
"""Groups and pulls that wait for a row. Nothing has so many unless no row ever comes."""


class Timeline:
    """All times are of `time.perf_counter`; in the file they count from the beginning of the session."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: where to write; nothing is, before the first row. None: nowhere."""
        self._path = path
        self.replicas: Callable[[], Sequence[int]] = tuple
        """Says the numbers of those that there are now."""
        self._zero, self._at = time.perf_counter(), time.time()
        self._file: JsonlSink | None = None
        self._in_flight: dict[int, GroupLife] = {}
        self._posted = 0  # so many; their number is their key in `_in_flight`
        self._told = 0  # of these a row told already
        self._groups: deque[GroupLife] = deque(maxlen=_KEPT)  # that ended since the last row
        self._pulls: deque[Pull] = deque(maxlen=_KEPT)
        self._uncounted: list[GroupLife] = []  # whose tokens no row has
        self._evaluated: list[Interval] = []  # by the step before
        self._generates = False  # not if all groups are demonstrations
        self.trouble: str | None = None
        """Why nothing is written any more; whoever tells of it sets it to None."""

    @contextmanager
    def group(self, seq: int, prompt: str, replica: int) -> Iterator[list[Group]]:
        """Around one group's stay at a replica. What it became is put into the list; one that became nothing, because another replica
        rolls it or it was given up, only ends."""
        posted, key, became = time.perf_counter(), self._posted, list[Group]()
        self._posted += 1
        self._in_flight[key] = GroupLife(seq, prompt, replica, posted, posted, posted, posted, 0, NO_VERSION, NO_VERSION)
        try:
            yield became
        finally:
            life = self._in_flight.pop(key)
            now = time.perf_counter()  # of one that became nothing here, the end must be known all the same
            self._groups.append(_lived(life, became[0], now) if became else life.until(now))

    def pulled(self, version: int, during: Interval, sending: Interval | None) -> None:
        """A version serves. `sending`: while the trainer sent it, if it did."""
        self._pulls.append(Pull(version, *during, *(sending or (during[1], during[1]))))

    def step(self, step: int, took: Sequence[Group], spans: Spans) -> dict[str, float]:
        """Records a step that `spans` has ended; returns what is measured of it: idle shares, and the speed of generation."""
        # what is in flight generates, as far as one can know here: where scoring is slow, some of it is being scored
        going = [life.until(spans.ended) for life in self._in_flight.values()]
        lives = [*self._groups, *going]
        self._generates |= any(life.seq >= 0 for life in lives)
        phases, seqs = tuple(Phase(*p) for p in spans.phases), tuple(group.seq for group in took)
        made = StepTime(step, spans.began, spans.ended, phases, seqs, tuple(self.replicas()) if self._generates else ())
        measured = shares([made], lives, list(self._pulls))
        metrics = (measured.metrics() if measured else {}) | self._speed(made, going)
        found = slowest(replica_paces(self._groups))
        if found is not None:
            metrics |= {"rollout/straggler_ratio": found[0], "rollout/straggler": float(found[1])}
        self._write(made)
        return metrics

    def close(self) -> None:
        """Writes what came after the last step."""
        if self._file is not None:
            self._write(None)
        if self._file is not None:
            self._file.close()

    def _speed(self, made: StepTime, going: Sequence[GroupLife]) -> dict[str, float]:
        """Generated tokens a second, since the row before or since an evaluation in it began; nothing if none were generated.

        Groups that come while a step is evaluated are the next step's, and so is the time of the evaluation in which they were generated.
        """
        evaluated = made.of("evaluate")
        until = evaluated[0][0] if evaluated else made.ended
        known = [*self._uncounted, *(life for life in self._groups if life.seq >= 0)]
        counted = [life for life in known if life.ended <= until]
        self._uncounted = [life for life in known if life.ended > until]
        generation = [life.generation for life in (*known, *going) if life.seq >= 0]
        seconds = until - made.began + total(common(self._evaluated, generation))
        self._evaluated = evaluated
        tokens = sum(life.tokens for life in counted)
        return {"tokens_per_s": tokens / seconds} if tokens and seconds > 0 else {}

    def _write(self, made: StepTime | None) -> None:
        row: dict[str, Any] = {} if made is None else made.shifted(-self._zero)._asdict()
        row["groups"] = [life.shifted(-self._zero) for life in self._groups]
        # each once, so that it is known of if it never comes back
        row["posted"] = [life.shifted(-self._zero) for key, life in self._in_flight.items() if key >= self._told]
        self._told = self._posted
        row["pulls"] = [pull.shifted(-self._zero) for pull in self._pulls]
        self._groups.clear()
        self._pulls.clear()
        if self._path is None:
            return
        try:
            self._append(self._path, row)
        except (VerstError, OSError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            self.trouble = f"warning: {self._path} could not be written ({cause}): the timeline of this run ends here, the run goes on"
            self._path = self._file = None

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self._file is None:
            self._file = JsonlSink(path)
            self._file.write({"session": self._at})
        self._file.write(row)
        if path.stat().st_size > _FILE_BYTES:
            self._file.close()
            self._file = None
            path.replace(older(path))


def _lived(life: GroupLife, group: Group, ended: float) -> GroupLife:
    scoring = max(life.posted, ended - group.timings.get("score_s", 0.0))
    newest = max((int(one.versions_T.max(initial=NO_VERSION)) for t in group.trajectories for one in t.sequences), default=NO_VERSION)
    return life._replace(
        began=max(life.posted, scoring - group.timings.get("teacher_s", 0.0) - group.timings.get("roll_s", 0.0)),
        scoring=scoring,
        ended=ended,
        tokens=sum(t.generated_tokens for t in group.trajectories),
        oldest=group.admitted_version,
        newest=max(newest, group.admitted_version),
    )
