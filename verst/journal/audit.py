"""Whether a run trained every group exactly once, proved from its journal alone.

Every byte is read. Nothing is taken for granted that the journal's own reader and writer refuse: the records are held against each other
one by one, and what does not fit is named.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verst.errors import InvariantViolation, JournalError
from verst.journal.codec import decode_group
from verst.journal.frames import BadFrame, Frame, Kind, durable_after, read_frame
from verst.journal.reader import parsed
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, Record, RecoveryRecord
from verst.journal.segments import FORMAT, SUFFIX, index_path, opened, segment_path
from verst.journal.sidecar import Rows, read_index
from verst.types import NO_VERSION


@dataclass
class Audit:
    """What a journal holds, how often each thing, and what must not be."""

    run_id: str = ""
    segments: int = 0
    segments_given_up: int = 0
    bytes_checked: int = 0
    groups_admitted: int = 0
    groups_finished: int = 0
    groups_unfinished: list[int] = field(default_factory=list)
    """Admitted, not finished: in flight in a run that lives, else missing, to be generated again."""
    groups_trained: int = 0
    """Each in exactly one committed step."""
    groups_in_training: int = 0
    """In the batch of a step that is not committed yet."""
    groups_pending: int = 0
    """Finished; no step has taken them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Groups that a step took and left out, by reason."""
    batches: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    """The weights hash of each committed step."""
    published: dict[int, str] = field(default_factory=dict)
    """The weights hash of each version that engines served, as it was served last."""
    staleness: dict[int, int] = field(default_factory=dict)
    """Trained groups by age of their oldest token in versions."""
    staleness_unknown: int = 0
    """Trained groups whose tokens were given up, or that no policy sampled."""
    checkpoints: list[int] = field(default_factory=list)
    changes: list[ConfigRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    recoveries: list[RecoveryRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is unusual and harmless: an unfinished end, an index file that will be made anew, other weights after a restart."""
    violations: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.violations


def audit(
    directory: Path,
    run_id: str | None = None,
    *,
    checkpoints: Sequence[int] = (),
    worst_staleness: int | None = None,
    exact: bool = False,
) -> Audit:
    """Audits a journal, also while it is being written.

    `checkpoints`: the steps of which there are some, looked up before: a living run makes more meanwhile. `worst_staleness`: the bound
    that slots, window and batch give. `exact`: a step that is trained again must reach the same weights.

    Raises `JournalError` if there is no journal, or it is of another run or format: then there is nothing to hold against anything.
    """
    auditor = _Auditor(worst_staleness, exact)
    reading = _Reading(directory, run_id, auditor.found)
    for frame, payload, where in reading.frames():
        try:
            auditor.take(frame, payload)
        except InvariantViolation as error:
            auditor.found.violations.append(f"{where}: {error}")
    return auditor.finish(checkpoints)


class _Reading:
    """Every frame of every segment, in order. What is wrong with the files themselves goes into `found`."""

    def __init__(self, directory: Path, run_id: str | None, found: Audit) -> None:
        self._directory, self._run_id, self._found = directory, run_id, found
        self._previous_bytes = 0

    def frames(self) -> Iterator[tuple[Frame, bytes | None, str]]:
        """Each with its payload (None: it was given up) and its place in words."""
        names = sorted(path.name for path in self._directory.glob(f"*{SUFFIX}"))
        if not names or not names[-1].removesuffix(SUFFIX).isdecimal():
            raise JournalError(f"{self._directory} holds no journal: put it back from a copy")
        last = int(names[-1].removesuffix(SUFFIX))
        for number in range(1, last + 1):
            path = segment_path(self._directory, number)
            if path.exists():
                yield from self._segment(number, last)
            else:
                yield from self._given_up(number)

    def _segment(self, number: int, last: int) -> Iterator[tuple[Frame, bytes | None, str]]:
        path, rows, offset = segment_path(self._directory, number), Rows(), 0
        with opened(path) as file:
            size = os.fstat(file).st_size
            while offset < size:
                try:
                    frame, payload = read_frame(file, offset, size)
                except BadFrame as bad:
                    self._bad(path, bad, size, may_be_torn=number == last and durable_after(file, offset + 1, size) <= offset)
                    break
                if offset == 0:
                    self._first(path, number, frame, payload)
                rows.add(frame, payload)
                yield frame, payload, f"{path.name}, byte {offset}"
                offset = frame.end
        self._found.segments += 1
        self._found.bytes_checked += offset
        self._previous_bytes = offset
        if offset == size and number < last:
            self._compare(number, rows)

    def _given_up(self, number: int) -> Iterator[tuple[Frame, bytes | None, str]]:
        path = index_path(self._directory, number)
        try:
            index = read_index(self._directory, number)
        except FileNotFoundError:
            self._found.violations.append(f"{segment_path(self._directory, number).name} is missing")
            return
        except BadFrame as bad:
            self._found.violations.append(f"{path.name}: {bad}, and its segment was given up")
            return
        if not index.given_up:
            self._found.violations.append(f"{segment_path(self._directory, number).name} is missing, though it was not given up")
        for frame, payload in index.frames():
            if frame.offset == 0:
                self._first(path, number, frame, payload or b"")
            yield frame, payload, f"{path.name}, byte {frame.offset} of its segment"
        self._found.segments_given_up += 1
        self._found.bytes_checked += path.stat().st_size
        self._previous_bytes = index.segment_bytes

    def _bad(self, path: Path, bad: BadFrame, size: int, *, may_be_torn: bool) -> None:
        if may_be_torn:
            self._found.notes.append(f"{path.name} ends with {size - bad.offset} bytes that are unfinished ({bad.reason})")
        else:
            self._found.violations.append(f"{path.name}: {bad}: what follows in this segment is not known")

    def _first(self, path: Path, number: int, frame: Frame, payload: bytes) -> None:
        """The segment record: raises `JournalError` for another run or format."""
        if frame.kind is not Kind.SEGMENT:
            self._found.violations.append(f"{path.name} begins without its segment record")
            return
        record = json.loads(payload)
        if record["format"] != FORMAT:
            raise JournalError(f"{path} has journal format {record['format']}, this version of Verst reads {FORMAT}: use the other version")
        if self._run_id is not None and record["run_id"] != self._run_id:
            raise JournalError(f"{path} belongs to run {record['run_id']!r}, not {self._run_id!r}: restore the run's own journal")
        self._run_id = self._found.run_id = record["run_id"]
        if frame.key != number:
            self._found.violations.append(f"{path.name} was written as segment {frame.key}")
        if record["previous_bytes"] != self._previous_bytes:
            self._found.violations.append(
                f"{path.name} says that {record['previous_bytes']} bytes were written before it, but {self._previous_bytes} are there"
            )

    def _compare(self, number: int, rows: Rows) -> None:
        """Holds the index file against its segment."""
        path = index_path(self._directory, number)
        try:
            index = read_index(self._directory, number)
        except FileNotFoundError:
            return
        except BadFrame as bad:
            self._found.notes.append(f"{path.name}: {bad}; it is made anew when the run is resumed")
            return
        self._found.bytes_checked += path.stat().st_size
        if not index.same_frames(rows.finished(number)):
            self._found.violations.append(f"{path.name} says otherwise than its segment: remove it, and it is made anew")


class _Auditor:
    """Takes the records one by one. Raises `InvariantViolation` for one that must not be."""

    def __init__(self, worst_staleness: int | None, exact: bool) -> None:
        self.found = Audit()
        self._worst_staleness, self._exact = worst_staleness, exact
        self._admitted: dict[int, int] = {}  # not finished: the version that was served
        self._finished: dict[int, int | None] = {}  # that no step took: the oldest version of a token that is trained
        self._taken: dict[int, int] = {}
        self._next_admitted = 0
        self._batch: BatchRecord | None = None  # not committed
        self._initial: str | None = None  # weights hash of version 0

    def take(self, frame: Frame, payload: bytes | None) -> None:
        if frame.kind is Kind.GROUP:
            self._group(frame.key, payload)
        elif frame.kind is not Kind.SEGMENT:
            self._record(parsed(frame, payload or b""))
        elif frame.offset:
            raise InvariantViolation("a segment has its segment record at its start only")

    def _record(self, record: Record) -> None:
        match record:
            case AdmitRecord():
                self._admit(record)
            case BatchRecord():
                self._take_batch(record)
            case CommitRecord():
                self._commit(record)
            case PublishRecord():
                self._publish(record)
            case ConfigRecord():
                self.found.changes.append(record)
            case FaultRecord():
                self.found.faults.append(record)
            case RecoveryRecord():
                self.found.recoveries.append(record)

    def _admit(self, record: AdmitRecord) -> None:
        seq = record.seq
        if seq in self._finished or seq in self._taken:
            raise InvariantViolation(f"group {seq} was admitted again though it is finished")
        again = seq in self._admitted
        self._admitted[seq] = record.version
        if again:  # a crash had left it unfinished
            return
        self.found.groups_admitted += 1
        expected, self._next_admitted = self._next_admitted, max(self._next_admitted, seq + 1)
        if record.version > len(self.found.digests):
            raise InvariantViolation(f"group {seq} was admitted with version {record.version}, which no step had made")
        if seq != expected:
            raise InvariantViolation(f"group {seq} was admitted where group {expected} comes next")

    def _group(self, seq: int, payload: bytes | None) -> None:
        if seq in self._finished or seq in self._taken:
            raise InvariantViolation(f"group {seq} is finished twice")
        self.found.groups_finished += 1
        admitted = self._admitted.pop(seq, None)
        oldest = None if payload is None else _oldest_version(payload)
        self._finished[seq] = oldest
        if admitted is None:
            raise InvariantViolation(f"group {seq} is finished, but was not admitted")
        if oldest is not None and oldest < admitted:
            raise InvariantViolation(f"group {seq} has tokens of version {oldest}, but the engines served {admitted} when it was admitted")

    def _take_batch(self, record: BatchRecord) -> None:
        wrong: list[str] = []
        expected, self.found.batches = self.found.batches + 1, record.step
        if record.step != expected:
            wrong.append(f"the batch of step {record.step} comes where that of step {expected} must")
        elif self._batch is not None:
            wrong.append(f"step {record.step} has a batch before step {self._batch.step} is committed")
        for seq in record.groups:
            self._age(seq, record.step, wrong)
        for seq in record.taken:
            if seq in self._taken:
                wrong.append(f"step {record.step} takes group {seq}, which step {self._taken[seq]} has taken")
            elif seq not in self._finished:
                wrong.append(f"step {record.step} takes group {seq}, which is not finished")
            self._taken[seq] = record.step
            self._finished.pop(seq, None)
        wrong += [f"step {record.step} drops group {seq} without a reason" for seq, reason in record.dropped.items() if not reason]
        self._batch = record
        if wrong:
            raise InvariantViolation("; ".join(wrong))

    def _age(self, seq: int, step: int, wrong: list[str]) -> None:
        oldest = self._finished.get(seq)
        if oldest is None:
            self.found.staleness_unknown += 1
            return
        age = step - 1 - oldest
        self.found.staleness[age] = self.found.staleness.get(age, 0) + 1
        if age < 0:
            wrong.append(f"step {step} trains group {seq}, whose tokens are of version {oldest}: no step had made that")
        elif self._worst_staleness is not None and age > self._worst_staleness:
            wrong.append(f"step {step} trains group {seq}, which is {age} versions old: the bound is {self._worst_staleness}")

    def _commit(self, record: CommitRecord) -> None:
        batch, self._batch = self._batch, None
        last = max(self.found.digests, default=0)
        self.found.digests[record.step] = record.digest
        if record.step != last + 1:
            raise InvariantViolation(f"step {record.step} is committed where step {last + 1} must be")
        if batch is None or batch.step != record.step:
            raise InvariantViolation(f"step {record.step} is committed, but has no batch before that")
        self.found.groups_trained += len(batch.groups)
        for reason in batch.dropped.values():
            self.found.dropped[reason] = self.found.dropped.get(reason, 0) + 1
        if not record.digest:
            raise InvariantViolation(f"step {record.step} is committed without a weights hash")

    def _publish(self, record: PublishRecord) -> None:
        version, digest = record.version, record.digest
        self.found.published[version] = digest
        if version == 0:
            self._initial = self._initial or digest
        elif version not in self.found.digests:
            raise InvariantViolation(f"the engines served version {version} before step {version} was committed")
        committed = self._initial if version == 0 else self.found.digests[version]
        if digest != committed:
            said = f"the engines served version {version} with the weights {digest}, but those of its commit are {committed}"
            if self._exact:
                raise InvariantViolation(said)
            self.found.notes.append(f"{said}: the step was trained again, with other rounding")
        if not record.replicas:
            raise InvariantViolation(f"version {version} is served by no replica")

    def finish(self, checkpoints: Sequence[int]) -> Audit:
        found = self.found
        found.groups_unfinished = sorted(self._admitted)
        found.groups_pending = len(self._finished)
        if self._batch is not None:
            found.groups_in_training = len(self._batch.groups)
            reasons: Mapping[str, int] = Counter(self._batch.dropped.values())
            found.dropped |= {reason: found.dropped.get(reason, 0) + count for reason, count in reasons.items()}
        found.checkpoints = sorted(checkpoints)
        unknown = [step for step in found.checkpoints if step not in found.digests]
        found.violations += [f"there is a checkpoint of step {step}, which was not committed" for step in unknown]
        return found


def _oldest_version(payload: bytes) -> int | None:
    """Of the tokens that are trained; None if no policy sampled any of them."""
    try:
        group = decode_group(payload)
    except JournalError as error:
        raise InvariantViolation(str(error)) from error
    masked = [one.versions_T[one.loss_mask_T] for t in group.trainable for one in t.sequences]
    return min((int(versions_T.min()) for found_T in masked if (versions_T := found_T[found_T != NO_VERSION]).size), default=None)
