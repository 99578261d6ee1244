"""What a journal holds, without its payloads: where each record lies, and which groups were trained by which step.

Sequence numbers count from 0, steps from 1; step S makes policy version S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from verst.errors import InvariantViolation, JournalError
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, Record, RecoveryRecord


class Location(NamedTuple):
    """Where a frame starts."""

    segment: int
    offset: int


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
        self.groups: dict[int, Location] = {}
        self.batches: dict[int, Location] = {}
        self.commits: dict[int, Location] = {}
        self.admitted: dict[int, Location] = {}  # the newest admission of each group
        self.published: dict[int, Location] = {}  # the newest publish of each version
        self.configured: list[Location] = []  # in the order in which they were written, as the two below
        self.faults: list[Location] = []
        self.recoveries: list[Location] = []
        self._digests: dict[int, str] = {}
        self._taken: dict[int, int] = {}  # seq → the step that took it

    @property
    def last_batch(self) -> int:
        """The newest step with a journaled batch, or 0."""
        return len(self.batches)

    @property
    def last_commit(self) -> int:
        """The newest committed step, or 0."""
        return len(self.commits)

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
        match record:
            case AdmitRecord():
                self.admitted[record.seq] = where
            case BatchRecord():
                self.batches[record.step] = where
                self._taken.update(dict.fromkeys(record.taken, record.step))
            case CommitRecord():
                self.commits[record.step] = where
                self._digests[record.step] = record.digest
            case PublishRecord():
                self.published[record.version] = where
            case ConfigRecord():
                self.configured.append(where)
            case FaultRecord():
                self.faults.append(where)
            case RecoveryRecord():
                self.recoveries.append(where)

    def check_group(self, seq: int) -> None:
        if seq < 0:
            raise InvariantViolation(f"group seq {seq} is negative: seq counts from 0")
        if seq in self.groups:
            raise InvariantViolation(f"group {seq} is in the journal already")

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
            if seq in self._taken:
                raise InvariantViolation(f"batch of step {record.step} names group {seq}, which step {self._taken[seq]} has taken")

    def _check_commit(self, record: CommitRecord) -> None:
        if record.step != self.last_commit + 1:
            raise InvariantViolation(f"commit of step {record.step} cannot follow that of step {self.last_commit}")
        if record.step not in self.batches:
            raise InvariantViolation(f"commit of step {record.step} has no batch in the journal")

    def add_group(self, seq: int, where: Location) -> None:
        self.groups[seq] = where

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
        next_seq = max(max(self.groups, default=-1), max(self.admitted, default=-1)) + 1
        return Recovery(
            retrain=tuple((step, self._digests.get(step)) for step in range(after_step + 1, self.last_batch + 1)),
            pending=tuple(sorted(seq for seq in self.groups if seq not in self._taken)),
            missing=tuple(seq for seq in range(next_seq) if seq not in self.groups),
            next_seq=next_seq,
        )
