"""The run's append-only journal, which is also the store of its trajectories.

`DIR/00000001.journal`, `DIR/00000002.journal`, … hold frames (`frames.py`); a segment that reached its size limit is followed by another.
Groups are written at once and reach the disk with the next batch or commit; those two are fsynced before `append_*` returns. So after a
loss of power the groups since the last batch may be gone (they are generated again), after a mere crash of processes nothing is.

A crash may leave a torn tail: bytes that were never said to be durable. It is left out and told, and the next record takes its place.
Damage anywhere else is a `JournalError` that names the place, and so is a torn tail that held the commit of a step of which there is a
checkpoint; then nothing is changed on disk.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from verst.errors import InvariantViolation, JournalError
from verst.journal.codec import decode_group
from verst.journal.frames import HEADER_BYTES, BadFrame, Frame, Kind, durable_after, pack_header, read_payload, scan
from verst.journal.index import Index, Location, Recovery
from verst.journal.records import (
    RECORDS,
    AdmitRecord,
    BatchRecord,
    CommitRecord,
    ConfigRecord,
    FaultRecord,
    PublishRecord,
    Record,
    RecoveryRecord,
)
from verst.journal.segments import (
    FORMAT,
    SUFFIX,
    create_segment,
    opened,
    segment_numbers,
    segment_path,
    sync_directory,
    write_all,
    write_error,
)
from verst.types import Group

SEGMENT_BYTES = 256 * 2**20

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class TornTail:
    """The end of the last segment that a crash left unfinished."""

    path: Path
    offset: int
    bytes_cut: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes_cut} bytes at byte {self.offset} are left out: a crash left them unfinished ({self.reason})"


class JournalReader:
    """Reads a journal, also while another process writes it: an unfinished tail is left alone, `refresh` sees what came since."""

    def __init__(self, directory: str | Path, run_id: str | None = None) -> None:
        """Verifies every byte. `run_id` None accepts any run.

        Raises `JournalError` if there is no journal, it is of another run or format, a segment is missing, or anything is damaged.
        """
        self.directory = Path(directory)
        self.index = Index()
        self.torn: TornTail | None = None
        self._run_id = run_id
        self._segment = 1
        self._end = 0  # verified bytes of that segment
        self.refresh()

    @property
    def run_id(self) -> str:
        return self._run_id or ""

    def refresh(self) -> None:
        """Takes in all records written since the last look. Raises as the constructor does."""
        for number in segment_numbers(self.directory):
            if number >= self._segment:
                self._read_segment(number)

    def recovery(self, after_step: int) -> Recovery:
        """What remains to be done after the state of `after_step` was restored (0: the initial model); see `Index.recovery`.

        Raises `JournalError` as that does, and if what seemed a torn tail had the commit of that step: a commit precedes its checkpoint.
        """
        if self.torn is not None and after_step > self.index.last_commit:
            raise JournalError(
                f"{self.torn.path}: {self.torn.reason} at byte {self.torn.offset}, though a checkpoint of step {after_step} was made after "
                f"it and the last commit before it is of step {self.index.last_commit}: restore the file from a copy, or resume from an "
                "older checkpoint by moving newer ones away"
            )
        return self.index.recovery(after_step)

    def group_payload(self, seq: int) -> bytes:
        """The group as it was journaled, encoded. Raises `JournalError` if it is unknown or its bytes went bad."""
        return self._payload(self.index.groups, seq, "group")

    def group(self, seq: int) -> Group:
        return decode_group(self.group_payload(seq))

    def batch(self, step: int) -> BatchRecord:
        return BatchRecord.from_json(self._payload(self.index.batches, step, "batch of step"))

    def commit(self, step: int) -> CommitRecord:
        return CommitRecord.from_json(self._payload(self.index.commits, step, "commit of step"))

    def admission(self, seq: int) -> AdmitRecord:
        """The newest admission of a group."""
        return AdmitRecord.from_json(self._payload(self.index.admitted, seq, "admission of group"))

    def publish(self, version: int) -> PublishRecord:
        """The newest publish of a version."""
        return PublishRecord.from_json(self._payload(self.index.published, version, "publish of version"))

    def changes(self) -> list[ConfigRecord]:
        """Every change of options, in order; so are the two below."""
        return self._all(ConfigRecord, self.index.configured)

    def faults(self) -> list[FaultRecord]:
        return self._all(FaultRecord, self.index.faults)

    def recoveries(self) -> list[RecoveryRecord]:
        return self._all(RecoveryRecord, self.index.recoveries)

    def _all(self, kind: type[R], places: list[Location]) -> list[R]:
        by_number = dict(enumerate(places))
        return [kind.from_json(self._payload(by_number, i, kind.kind.name)) for i in by_number]

    def _path(self, number: int) -> Path:
        return segment_path(self.directory, number)

    def _payload(self, places: dict[int, Location], key: int, what: str) -> bytes:
        if key not in places:
            raise JournalError(f"{self.directory} holds no {what} {key}")
        segment, offset = places[key]
        with opened(self._path(segment)) as file:
            try:
                return read_payload(file, offset)
            except BadFrame as error:
                raise JournalError(f"{self._path(segment)}: {what} {key} has {error}") from error

    def _read_segment(self, number: int) -> None:
        if number > self._segment and self.torn is not None:
            raise JournalError(f"{self.torn.path}: {self.torn.reason} at byte {self.torn.offset}, though segment {number} follows")
        start = self._end if number == self._segment else 0
        path = self._path(number)
        self.torn = None
        with opened(path) as file:
            size = os.fstat(file).st_size
            try:
                for frame in scan(file, start, size):
                    self._take(file, frame, number)
                    self._segment, self._end = number, frame.end
            except BadFrame as bad:
                if bad.offset == 0 or durable_after(file, bad.offset + 1, size) > bad.offset:
                    raise JournalError(f"{path}: {bad}, in a part that had been written completely: restore the file from a copy") from bad
                self.torn = TornTail(path, bad.offset, size - bad.offset, bad.reason)
        if self._segment != number or not self._end:
            raise JournalError(f"{path} is empty: restore the file from a copy")

    def _take(self, file: int, frame: Frame, number: int) -> None:
        """Puts one intact frame into the index."""
        where = Location(number, frame.offset)
        try:
            if (frame.kind is Kind.SEGMENT) != (frame.offset == 0):
                raise InvariantViolation("a segment starts with its segment record, and has no other")
            if frame.kind is Kind.SEGMENT:
                self._check_segment(json.loads(read_payload(file, 0)), frame.key, number)
            elif frame.kind is Kind.GROUP:
                self.index.check_group(frame.key)
                self.index.add_group(frame.key, where)
            else:
                self.index.take(_parsed(frame, read_payload(file, frame.offset)), where)
        except InvariantViolation as error:
            raise JournalError(f"{self._path(number)}, byte {frame.offset}: {error}") from error

    def _check_segment(self, record: dict[str, object], key: int, number: int) -> None:
        path = self._path(number)
        if record["format"] != FORMAT:
            raise JournalError(f"{path} has journal format {record['format']}, this version of Verst reads {FORMAT}: use the other version")
        if self._run_id is not None and record["run_id"] != self._run_id:
            raise JournalError(f"{path} belongs to run {record['run_id']!r}, not {self._run_id!r}: choose another run.name or run.dir")
        if key != number:
            raise JournalError(f"{path} was written as segment {key}: a file was renamed")
        if record["previous_bytes"] != self._end:
            raise JournalError(f"{self._path(number - 1)} ends at byte {self._end}, but {record['previous_bytes']} bytes had been written")
        self._run_id = str(record["run_id"])


class Journal(JournalReader):
    """The one writer of a journal; guard its directory with a `RunLock`. Methods may be called from several threads.

    `append_group` waits for no fsync: batches and commits take turns for theirs, and hold `_lock` only while they write.
    """

    @classmethod
    def create(cls, directory: str | Path, run_id: str, *, segment_bytes: int = SEGMENT_BYTES) -> Journal:
        """A new journal. Raises `JournalError` if the directory holds one already."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.glob(f"*{SUFFIX}")):
            raise JournalError(f"{directory} holds a journal already: resume that run, or choose another run.name")
        create_segment(directory, 1, run_id, previous_bytes=0)
        sync_directory(directory.parent)
        return cls(directory, run_id, segment_bytes=segment_bytes)

    @classmethod
    def open(cls, directory: str | Path, run_id: str | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> Journal:
        """An existing journal, to go on writing. A torn tail is told in `torn`; the first append cuts it off. Raises as `JournalReader`."""
        return cls(directory, run_id, segment_bytes=segment_bytes)

    def __init__(self, directory: str | Path, run_id: str | None = None, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        super().__init__(directory, run_id)
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()  # of everything below
        self._syncing = threading.Lock()  # held through an fsync, and taken before `_lock`
        self._broken: str | None = None
        for leftover in self.directory.glob("*.partial"):
            leftover.unlink()
        self._file = os.open(self._path(self._segment), os.O_RDWR | os.O_CLOEXEC)
        os.fsync(self._file)
        self._durable = self._end
        self._uncut = self.torn is not None

    def append_group(self, seq: int, payload: bytes | memoryview) -> None:
        """Writes a group encoded by `encode_group`; durable with the next batch or commit.

        Like the other appends, raises `InvariantViolation` for a record that does not follow from those before it, and `JournalError`
        if it could not be written: after a full disk the journal stays usable and the record may be appended again.
        """
        with self._lock:
            self.index.check_group(seq)
            self.index.add_group(seq, self._append(Kind.GROUP, seq, payload))

    def append_batch(self, record: BatchRecord) -> None:
        """Writes which groups a step trains. Durable on return, and with it all groups before it."""
        self._append_durably(record)

    def append_commit(self, record: CommitRecord) -> None:
        """Writes that a step is done. Durable on return."""
        self._append_durably(record)

    def append_admitted(self, record: AdmitRecord) -> None:
        """Writes that a prompt was admitted; durable with the next batch or commit, as the records below."""
        self._append_record(record)

    def append_published(self, record: PublishRecord) -> None:
        """Writes that all engines hold a version, and have verified it."""
        self._append_record(record)

    def append_configured(self, record: ConfigRecord) -> None:
        """Writes that options were changed."""
        self._append_record(record)

    def append_fault(self, record: FaultRecord) -> None:
        """Writes that a process or part of the run failed."""
        self._append_record(record)

    def append_recovery(self, record: RecoveryRecord) -> None:
        """Writes how it came back."""
        self._append_record(record)

    def sync(self) -> None:
        """Makes everything appended so far durable."""
        with self._syncing:
            self._sync()

    def close(self) -> None:
        """Makes everything durable and closes the file. Nothing can be appended afterwards."""
        with self._syncing:
            if self._broken is None:
                self._sync()
                with self._lock:
                    self._broken = "it is closed"
                    os.close(self._file)

    def _append_durably(self, record: BatchRecord | CommitRecord) -> None:
        with self._syncing:
            with self._lock:
                self.index.check(record)
                self._roll_if_full()
                where = self._append(record.kind, record.key, record.to_json())
            self._sync()
            with self._lock:  # it counts once it is durable
                self.index.add(record, where)

    def _append_record(self, record: Record) -> None:
        with self._lock:
            self.index.check(record)
            self.index.add(record, self._append(record.kind, record.key, record.to_json()))

    def _append(self, kind: Kind, key: int, payload: bytes | memoryview) -> Location:
        if self._broken is not None:
            raise JournalError(f"{self.directory} takes no more records: {self._broken}")
        length = HEADER_BYTES + memoryview(payload).nbytes
        self._cut()
        header = pack_header(kind, key, payload, durable_bytes=self._durable)
        where = Location(self._segment, self._end)
        try:
            write_all(self._file, [header, payload], self._end)
        except OSError as error:
            self._discard_partial(error)
            raise write_error(self._path(self._segment), length, error) from error
        self._end += length
        return where

    def _cut(self) -> None:
        """Removes the torn tail if there is one, so that no part of it can follow the records to come."""
        if not self._uncut:
            return
        try:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            raise write_error(self._path(self._segment), 0, error) from error
        self._uncut = False

    def _sync(self) -> None:
        end = self._end  # what is written while the disk works may not be part of it
        try:
            os.fsync(self._file)
        except OSError as error:
            # What reached the disk is unknown from here on, and a second fsync may wrongly succeed: only a fresh scan can tell.
            self._broken = f"fsync failed ({error.strerror}); check the disk and resume the run"
            raise JournalError(f"{self._path(self._segment)}: {self._broken}") from error
        self._durable = end

    def _roll_if_full(self) -> None:
        """Begins another segment, once for many steps. Only before a batch or commit: no other thread is inside an fsync then."""
        if self._broken is not None or self._end < self._segment_bytes:
            return
        self._cut()
        self._sync()
        create_segment(self.directory, self._segment + 1, self.run_id, previous_bytes=self._end)
        os.close(self._file)
        self._segment += 1
        self._file = os.open(self._path(self._segment), os.O_RDWR | os.O_CLOEXEC)
        self._end = self._durable = os.fstat(self._file).st_size

    def _discard_partial(self, cause: OSError) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as error:
            self._broken = f"a partial record could not be removed ({error.strerror}) after a failed write ({cause.strerror})"


def _parsed(frame: Frame, payload: bytes) -> Record:
    """Raises `InvariantViolation` if an intact payload is no such record."""
    try:
        record = RECORDS[frame.kind].from_json(payload)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvariantViolation(f"a record {frame.kind.name} cannot be read ({error}): it was written by another program") from error
    if record.key != frame.key:
        raise InvariantViolation(f"a record {frame.kind.name} of {record.key} has the key {frame.key}")
    return record
