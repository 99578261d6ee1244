"""The run's append-only journal, which is also the store of its trajectories.

`DIR/00000001.journal`, `DIR/00000002.journal`, … hold frames (`frames.py`); a segment that reached its size limit is followed by another,
and gets an index file (`sidecar.py`). `docs/journal.md` has the layout byte by byte.
Groups are written at once and reach the disk with the next batch or commit; those two are fsynced before `append_*` returns. So after a
loss of power the groups since the last batch may be gone (they are generated again), after a mere crash of processes nothing is.

A crash may leave a torn tail: bytes that were never said to be durable. It is left out and told, and the next record takes its place.
Damage anywhere else is a `JournalError` that names the place, and so is a torn tail that held the commit of a step of which there is a
checkpoint; then nothing is changed on disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from verst.errors import JournalError
from verst.journal.frames import HEADER_BYTES, BadFrame, Kind, pack_header, parse_header
from verst.journal.places import Location
from verst.journal.reader import JournalReader
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, ConfigRecord, FaultRecord, PublishRecord, Record, RecoveryRecord
from verst.journal.segments import SUFFIX, create_segment, sync_directory, write_all, write_error
from verst.journal.sidecar import SegmentIndex, index_of, read_index

__all__ = ["Journal", "JournalReader"]

SEGMENT_BYTES = 256 * 2**20


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
        self._write_s = 0.0
        try:
            for leftover in self.directory.glob("*.partial"):
                leftover.unlink()
            self._file = os.open(self._path(self._segment), os.O_RDWR | os.O_CLOEXEC)
            os.fsync(self._file)
        except OSError as error:
            raise write_error(self._path(self._segment), 0, error) from error
        self._durable = self._end
        self._uncut = self.torn is not None

    def append_group(self, seq: int, payload: bytes | memoryview) -> None:
        """Writes a group encoded by `encode_group`; durable with the next batch or commit.

        Like the other appends, raises `InvariantViolation` for a record that does not follow from those before it, and `JournalError`
        if it could not be written: after a full disk the journal stays usable and the record may be appended again.
        """
        with self._timed(), self._lock:
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

    def report(self) -> dict[str, float]:
        """`journal/bytes`, and `journal/write_s`: how long appending has held those who call it since the last report."""
        with self._lock:
            write_s, self._write_s = self._write_s, 0.0
        return {"journal/bytes": float(self.size_bytes), "journal/write_s": write_s}

    def give_up(self, through_step: int, limit_bytes: int) -> list[int]:
        """Gives up payloads of groups until the journal takes no more than `limit_bytes`, segment by segment from the oldest.

        Only of finished segments without a group that no step up to `through_step` took, and without a batch after it: with the state of
        that step, nothing needs them. Returns the numbers of the segments. Raises `JournalError` if the disk refuses.
        """
        released = []
        for number in range(1, self._segment):
            if self.size_bytes <= limit_bytes:
                break
            if number in self.given_up:
                continue
            found = self._index_of(number)
            if self._needs(found, through_step):
                continue
            try:
                held = found.without_payloads().write(self.directory, durably=True)
                with self._lock:
                    self.given_up.add(number)
                    self._held[number] = held
                self._path(number).unlink(missing_ok=True)
            except OSError as error:
                raise write_error(self._path(number), 0, error) from error
            released.append(number)
        return released

    def _needs(self, found: SegmentIndex, through_step: int) -> bool:
        with self._lock:
            steps_N = self.index.steps_of(found.keys(Kind.GROUP))
        batches_N = found.keys(Kind.BATCH)
        return bool((steps_N == 0).any() or (steps_N > through_step).any() or (batches_N > through_step).any())

    def _index_of(self, number: int) -> SegmentIndex:
        try:
            return read_index(self.directory, number)
        except (BadFrame, OSError):
            return index_of(self.directory, number)

    def _finish(self, number: int) -> None:
        with suppress(OSError):  # on a full disk it is made when the journal is opened again
            self._rows.finished(number).write(self.directory)
        super()._finish(number)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._write_s += time.perf_counter() - began

    def _append_durably(self, record: BatchRecord | CommitRecord) -> None:
        with self._timed(), self._syncing:
            with self._lock:
                self.index.check(record)
                self._roll_if_full()
                where = self._append(record.kind, record.key, record.to_json())
            self._sync()
            with self._lock:  # it counts once it is durable
                self.index.add(record, where)

    def _append_record(self, record: Record) -> None:
        with self._timed(), self._lock:
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
        frame = parse_header(header, self._end)
        assert frame is not None, "it was just made"
        self._rows.add(frame, payload)
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
        number = self._segment + 1
        create_segment(self.directory, number, self.run_id, previous_bytes=self._end)
        try:
            file = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise write_error(self._path(number), 0, error) from error
        os.close(self._file)
        self._file = file
        self._finish(self._segment)
        self._scan(number, 0)
        self._durable = self._end

    def _discard_partial(self, cause: OSError) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as error:
            self._broken = f"a partial record could not be removed ({error.strerror}) after a failed write ({cause.strerror})"
