"""What a journal holds, without its payloads: where each record lies, and which groups were trained by which step.

Sequence numbers count from 0, steps from 1; step S makes policy version S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from verst.errors import InvariantViolation, JournalError
from verst.journal.frames import Kind
from verst.journal.places import Column, Location, Places
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, Record, RecoveryRecord
from verst.journal.sidecar import Joined, SegmentIndex

_MOST_BEYOND = 1 << 24
"""How far a group's number may be from those before it: numbers are given one by one, so any other is not of this program."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What remains to be done after the state of some step was restored."""

    retrain: tuple[tuple[int, str | None], ...]  # each journaled step after it, in order, with its committed digest if it has one
    pending: tuple[int, ...]  # `seq` of groups no step took, ascending: train them, do not generate them again
    missing: tuple[int, ...]  # `seq` below `next_seq` that were admitted but never finished: generate them again
    next_seq: int  # the first `seq` never seen


class Index:
    """Groups by seq, batches and commits by step. Refuses whatever would train a group twice or leave a step out."""

    def __init__(self) -> None:
        self.groups = Places()
        self.batches = Places()
        self.commits = Places()
        self.admitted = Places()  # the newest admission of each group
        self.published = Places()  # the newest publish of each version
        self.configured: list[Location] = []  # in the order in which they were written, as the two below
        self.faults: list[Location] = []
        self.recoveries: list[Location] = []
        self._digests: list[str] = []  # of each commit
        self._taken = Column(np.int32)  # by seq: the step that took it

    @property
    def last_batch(self) -> int:
        """The newest step with a journaled batch, or 0."""
        return max(0, self.batches.end - 1)  # steps have no gaps

    @property
    def last_commit(self) -> int:
        """The newest committed step, or 0."""
        return max(0, self.commits.end - 1)

    def step_of(self, seq: int) -> int:
        """The step that took a group, 0 if none did yet."""
        return self._taken.get(seq)

    def steps_of(self, seqs_N: NDArray[np.int64]) -> NDArray[np.int32]:
        """The same of many groups."""
        return self._taken.get_all(seqs_N)

    def take(self, record: Record, where: Location) -> None:
        """Adds a record. Raises `InvariantViolation` if it does not follow from those before it."""
        self.check(record)
        self.add(record, where)

    def check(self, record: Record) -> None:
        """Raises `InvariantViolation` if a record does not follow from those before it."""
        match record:
            case AdmitRecord():
                self.check_group(record.seq)
            case BatchRecord():
                self._check_batch(record)
            case CommitRecord():
                self._check_commit(record)
            case PublishRecord():
                self._check_published(record)

    def add(self, record: Record, where: Location) -> None:
        """Adds a record that was checked."""
        match record:
            case AdmitRecord():
                self.admitted.add(record.seq, where)
            case BatchRecord():
                self.batches.add(record.step, where)
                self._taken.set_all(np.array(record.taken, np.int64), record.step)
            case CommitRecord():
                self.commits.add(record.step, where)
                self._digests.append(record.digest)
            case PublishRecord():
                self.published.add(record.version, where)
            case ConfigRecord():
                self.configured.append(where)
            case FaultRecord():
                self.faults.append(where)
            case RecoveryRecord():
                self.recoveries.append(where)

    def check_group(self, seq: int) -> None:
        if seq < 0:
            raise InvariantViolation(f"group seq {seq} is negative: seq counts from 0")
        if seq >= self._next_seq + _MOST_BEYOND:
            raise InvariantViolation(f"group seq {seq} is far beyond the {self._next_seq} before it: no group was given such a number")
        if seq in self.groups:
            raise InvariantViolation(f"group {seq} is in the journal already")

    def add_group(self, seq: int, where: Location) -> None:
        self.groups.add(seq, where)

    def _check_published(self, record: PublishRecord) -> None:
        if not 0 <= record.version <= self.last_commit:
            raise InvariantViolation(f"version {record.version} cannot be served: the last commit is of step {self.last_commit}")

    def _check_batch(self, record: BatchRecord) -> None:
        if record.step != self.last_batch + 1:
            raise InvariantViolation(f"batch of step {record.step} cannot follow that of step {self.last_batch}")
        seqs = record.taken
        if len(set(seqs)) != len(seqs):
            raise InvariantViolation(f"batch of step {record.step} names a group twice: {list(seqs)}")
        for seq in seqs:
            if seq not in self.groups:
                raise InvariantViolation(f"batch of step {record.step} names group {seq}, which is not in the journal")
            if step := self._taken.get(seq):
                raise InvariantViolation(f"batch of step {record.step} names group {seq}, which step {step} has taken")

    def _check_commit(self, record: CommitRecord) -> None:
        if record.step != self.last_commit + 1:
            raise InvariantViolation(f"commit of step {record.step} cannot follow that of step {self.last_commit}")
        if record.step not in self.batches:
            raise InvariantViolation(f"commit of step {record.step} has no batch in the journal")

    def take_segments(self, segments: Sequence[SegmentIndex]) -> None:
        """Adds all records of consecutive segments at once. Raises `InvariantViolation`, and adds nothing, if they do not follow from those
        before. Says less about what is wrong than the records do one by one.
        """
        joined = Joined(segments)
        taken = [[*batch["groups"], *map(int, batch["dropped"])] for batch in joined.values(Kind.BATCH)]
        taken_N = np.array(list(chain.from_iterable(taken)), np.int64)
        steps_N = np.repeat(joined.keys(Kind.BATCH), [len(seqs) for seqs in taken])
        self._check_joined(joined, taken_N)
        for places, kind in ((self.groups, Kind.GROUP), (self.batches, Kind.BATCH), (self.commits, Kind.COMMIT)):
            places.add_all(joined.keys(kind), *joined.places(kind))
        for places, kind in ((self.admitted, Kind.ADMIT), (self.published, Kind.PUBLISH)):
            places.add_all(joined.keys(kind), *joined.places(kind))
        for found, kind in ((self.configured, Kind.CONFIG), (self.faults, Kind.FAULT), (self.recoveries, Kind.RECOVERY)):
            found.extend(Location(int(number), int(offset)) for number, offset in zip(*joined.places(kind), strict=True))
        self._digests.extend(commit["digest"] for commit in joined.values(Kind.COMMIT))
        self._taken.set_all(taken_N, steps_N)

    def _check_joined(self, joined: Joined, taken_N: NDArray[np.int64]) -> None:
        seqs_N, batches_N, commits_N = (joined.keys(kind) for kind in (Kind.GROUP, Kind.BATCH, Kind.COMMIT))
        named_N = np.concatenate([seqs_N, joined.keys(Kind.ADMIT), taken_N])
        last_batch = self.last_batch + len(batches_N)
        last_commit = self.last_commit + len(commits_N)
        versions_N = joined.keys(Kind.PUBLISH)
        sound = (
            bool(((named_N >= 0) & (named_N < self._next_seq + _MOST_BEYOND)).all())
            and _distinct(seqs_N)
            and not self.groups.holds(seqs_N).any()
            and np.array_equal(batches_N, np.arange(self.last_batch + 1, last_batch + 1))
            and np.array_equal(commits_N, np.arange(self.last_commit + 1, last_commit + 1))
            and last_commit <= last_batch
            and _distinct(taken_N)
            and not self._taken.get_all(taken_N).any()
            and bool((self.groups.holds(taken_N) | np.isin(taken_N, seqs_N, assume_unique=True)).all())
            and bool(((versions_N >= 0) & (versions_N <= last_commit)).all())
        )
        if not sound:
            raise InvariantViolation("its records do not follow from those before them")

    @property
    def _next_seq(self) -> int:
        """The first that was neither finished nor admitted."""
        return max(self.groups.end, self.admitted.end)

    def recovery(self, after_step: int) -> Recovery:
        """What to do after restoring the state of `after_step` (0: the initial model).

        Raises `JournalError` if that step was never committed here: state and journal are then of different runs, or the journal lost
        its end, and going on would train something twice.
        """
        if after_step and after_step not in self.commits:
            raise JournalError(
                f"the restored state is of step {after_step}, but the journal's last commit is of step {self.last_commit}: "
                "they do not belong together. Restore an older checkpoint or start another run"
            )
        next_seq = self._next_seq
        finished_S = self.groups.holds_up_to(next_seq)
        digests = [*self._digests[after_step:], *[None] * (self.last_batch - self.last_commit)]
        return Recovery(
            retrain=tuple(enumerate(digests, start=after_step + 1)),
            pending=tuple(np.flatnonzero(finished_S & (self._taken.up_to(next_seq) == 0)).tolist()),
            missing=tuple(np.flatnonzero(~finished_S).tolist()),
            next_seq=next_seq,
        )


def _distinct(keys_N: NDArray[np.int64]) -> bool:
    """Of keys that lie near each other."""
    return not keys_N.size or int(np.bincount(keys_N - keys_N.min()).max()) == 1
