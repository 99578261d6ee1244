"""Reads a journal, also while another process writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from verst.errors import InvariantViolation, JournalError
from verst.journal.codec import decode_group
from verst.journal.frames import BadFrame, Frame, Kind, durable_after, read_payload, scan
from verst.journal.index import Index, Recovery
from verst.journal.places import Location
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
from verst.journal.segments import FORMAT, index_path, missing, opened, segment_numbers, segment_path
from verst.journal.sidecar import Rows, SegmentIndex, read_index
from verst.types import Group

R = TypeVar("R", bound=Record)

_AT_ONCE = 64
"""Segments whose indexes are taken in together: some MB of them."""


@dataclass(frozen=True, slots=True)
class TornTail:
    """The end of the last segment that a crash left unfinished."""

    path: Path
    offset: int
    bytes_cut: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.bytes_cut} bytes at byte {self.offset} are left out: a crash left them unfinished ({self.reason})"


class Indexed(NamedTuple):
    """A finished segment of which the index file is used."""

    found: SegmentIndex
    first_record: bytes  # of the segment itself, where that is there
    segment_bytes: int  # on disk


class JournalReader:
    """A journal's index and, on demand, its payloads. An unfinished tail is left alone, `refresh` sees what came since."""

    def __init__(self, directory: str | Path, run_id: str | None = None, *, verify: bool = False) -> None:
        """Reads the index files of finished segments, and verifies every byte of the last one; `verify`: of all. `run_id` None accepts any
        run. Payloads are verified whenever they are read.

        Raises `JournalError` if there is no journal, it is of another run or format, a segment is missing, or damage is found.
        """
        self.directory = Path(directory)
        self.index = Index()
        self.torn: TornTail | None = None
        self.remade: list[str] = []
        """Index files that were not used, each with the reason. One that is merely missing is not among them."""
        self.given_up: set[int] = set()
        """Segments of whose groups only the index is kept."""
        self._run_id = run_id
        self._verify = verify
        self._segment = 1
        self._end = 0  # verified bytes of that segment
        self._rows = Rows()  # of that segment
        self._held: dict[int, int] = {}  # bytes on disk of each finished segment and its index
        self._recent: SegmentIndex | None = None  # of a segment that was given up
        self.refresh()

    @property
    def run_id(self) -> str:
        return self._run_id or ""

    @property
    def size_bytes(self) -> int:
        """What it takes on disk, a torn tail left out."""
        return sum(self._held.values()) + self._end

    def refresh(self) -> None:
        """Takes in all records written since the last look. Raises as the constructor does."""
        numbers = segment_numbers(self.directory)
        todo = numbers[self._segment - 1 :]
        if len(todo) > 1:
            with opened(self._path(todo[-1])) as file:  # it is read last, and may come from the disk meanwhile
                _advise(file, "WILLNEED")
        while todo:
            indexed = self._indexed(todo[:-1])
            if indexed:
                self._enter(indexed)
            else:
                self._read(todo[0], finished=len(todo) > 1)
            todo = todo[max(1, len(indexed)) :]

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

    def keeps(self, seq: int) -> bool:
        """Whether the payload of a journaled group has not been given up."""
        return self.index.groups[seq].segment not in self.given_up

    def group_payload(self, seq: int) -> bytes:
        """The group as it was journaled, encoded. Raises `JournalError` if it is unknown, was given up, or its bytes went bad."""
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

    def _all(self, kind: type[R], places: Sequence[Location]) -> list[R]:
        by_number = dict(enumerate(places))
        return [kind.from_json(self._payload(by_number, i, kind.kind.name)) for i in by_number]

    def _path(self, number: int) -> Path:
        return segment_path(self.directory, number)

    def _payload(self, places: Mapping[int, Location], key: int, what: str) -> bytes:
        if key not in places:
            raise JournalError(f"{self.directory} holds no {what} {key}")
        segment, offset = places[key]
        path = self._path(segment)
        if segment in self.given_up or not path.exists():
            return self._kept_payload(segment, offset, f"{what} {key}")
        with opened(path) as file:
            try:
                return read_payload(file, offset)
            except BadFrame as error:
                raise JournalError(f"{path}: {what} {key} has {error}") from error

    def _kept_payload(self, segment: int, offset: int, what: str) -> bytes:
        """Of a record in a segment that was given up."""
        if self._recent is None or self._recent.number != segment:
            self._recent = self._kept(segment)
        payload = self._recent.payload_at(offset)
        if payload is None:
            path = index_path(self.directory, segment)
            raise JournalError(f"{what} was given up by retention (checkpoint.journal_limit_bytes): {path} only says that it was there")
        return payload

    def _kept(self, number: int) -> SegmentIndex:
        """The index of a segment that is not there. Raises `JournalError` unless it was given up."""
        try:
            found = read_index(self.directory, number)
        except (BadFrame, OSError) as error:
            path = index_path(self.directory, number)
            raise JournalError(f"{path}: {error}, and its segment was given up: restore the file from a copy") from error
        if not found.given_up:
            raise missing(self._path(number), index_path(self.directory, number).name)
        self.given_up.add(number)
        return found

    def _read(self, number: int, *, finished: bool) -> None:
        """Takes in what is new in a segment. `finished`: another one follows."""
        if number > self._segment and self.torn is not None:
            raise JournalError(f"{self.torn.path}: {self.torn.reason} at byte {self.torn.offset}, though segment {number} follows")
        self._scan(number, self._end if self._begun(number) else 0)
        if finished and self.torn is None:
            self._finish(number)

    def _begun(self, number: int) -> bool:
        """Whether frames of a segment were read already."""
        return number == self._segment and self._end > 0

    def _finish(self, number: int) -> None:
        """A segment was read to its end, and another one follows."""
        self._held[number] = self._end + _size(index_path(self.directory, number))

    # ---- by its index

    def _indexed(self, numbers: Sequence[int]) -> list[Indexed]:
        """The first of some finished segments, up to one that must be read itself."""
        found: list[Indexed] = []
        for number in numbers[:_AT_ONCE]:
            indexed = None if self._begun(number) or self.torn else self._index_of_segment(number)
            if indexed is None:
                break
            found.append(indexed)
        return found

    def _index_of_segment(self, number: int) -> Indexed | None:
        """None if the index file must not be relied on."""
        path = self._path(number)
        try:
            segment_bytes = path.stat().st_size
        except FileNotFoundError:
            kept = self._kept(number)
            return Indexed(kept, kept.first_record, 0)
        if self._verify:
            return None
        try:
            found = read_index(self.directory, number)
            if segment_bytes != found.segment_bytes:
                raise BadFrame(0, f"the index of a segment of {found.segment_bytes} bytes")
            with opened(path) as file:
                _advise(file, "RANDOM")  # else the disk would read ahead of its first frame
                return Indexed(found, read_payload(file, 0), segment_bytes)
        except FileNotFoundError:
            return None
        except BadFrame as error:
            self._refuse_index(number, error)
            return None

    def _refuse_index(self, number: int, error: Exception) -> None:
        path = index_path(self.directory, number)
        if number in self.given_up:
            raise JournalError(f"{path}: {error}, and its segment was given up: restore the file from a copy") from error
        line = f"{path} is not used: {error}; it is made anew from its segment"
        if line not in self.remade:  # it may have been looked at as one of several, and again alone
            self.remade.append(line)

    def _enter(self, indexed: Sequence[Indexed]) -> None:
        """Takes in whole segments."""
        before = self._segment, self._end
        for each in indexed:
            self._check_segment(each.first_record, int(each.found.keys_F[0]), each.found.number)
            self._segment, self._end = each.found.number, each.found.segment_bytes
            self._held[each.found.number] = each.segment_bytes + each.found.file_bytes
        try:
            self.index.take_segments([each.found for each in indexed])
        except InvariantViolation as error:
            self._segment, self._end = before
            if len(indexed) == 1:
                self._refuse_index(indexed[0].found.number, error)
                self._read(indexed[0].found.number, finished=True)
            else:  # which of them it is
                for each in indexed:
                    self._enter([each])

    # ---- byte by byte

    def _scan(self, number: int, start: int) -> None:
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
        payload = b"" if frame.kind is Kind.GROUP else read_payload(file, frame.offset)
        try:
            if (frame.kind is Kind.SEGMENT) != (frame.offset == 0):
                raise InvariantViolation("a segment starts with its segment record, and has no other")
            if frame.kind is Kind.SEGMENT:
                self._check_segment(payload, frame.key, number)
                self._rows = Rows()
            elif frame.kind is Kind.GROUP:
                self.index.check_group(frame.key)
                self.index.add_group(frame.key, where)
            else:
                self.index.take(parsed(frame, payload), where)
        except InvariantViolation as error:
            raise JournalError(f"{self._path(number)}, byte {frame.offset}: {error}") from error
        self._rows.add(frame, payload)

    def _check_segment(self, payload: bytes, key: int, number: int) -> None:
        """Raises `JournalError` if a segment record is not the one that must be here."""
        path, record = self._path(number), json.loads(payload)
        if record["format"] != FORMAT:
            raise JournalError(f"{path} has journal format {record['format']}, this version of Verst reads {FORMAT}: use the other version")
        if self._run_id is not None and record["run_id"] != self._run_id:
            raise JournalError(f"{path} belongs to run {record['run_id']!r}, not {self._run_id!r}: choose another run.name or run.dir")
        if key != number:
            raise JournalError(f"{path} was written as segment {key}: a file was renamed")
        if record["previous_bytes"] != self._end:
            raise JournalError(f"{self._path(number - 1)} ends at byte {self._end}, but {record['previous_bytes']} bytes had been written")
        self._run_id = str(record["run_id"])


def parsed(frame: Frame, payload: bytes) -> Record:
    """The record in a frame. Raises `InvariantViolation` if an intact payload is none."""
    try:
        record = RECORDS[frame.kind].from_json(payload)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvariantViolation(f"a record {frame.kind.name} cannot be read ({error}): it was written by another program") from error
    if record.key != frame.key:
        raise InvariantViolation(f"a record {frame.kind.name} of {record.key} has the key {frame.key}")
    return record


def _advise(file: int, advice: str) -> None:
    """Tells the system how a file will be read, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, getattr(os, f"POSIX_FADV_{advice}"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
