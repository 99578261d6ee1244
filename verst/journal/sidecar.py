"""The index file beside each finished segment: `00000001.index` has all of `00000001.journal` but the payloads of its groups.

With it a journal opens without reading its segments. It is made of the segment, and made anew if it is missing, damaged or of other bytes,
until the payloads are given up (`Journal.give_up`): then the segment is gone, and its index is what remains.

The file is one frame (`frames.py`), whose payload is, little-endian and without gaps: the number of the segment's frames F (uint32), flags
(uint32; 1: the payloads were given up), then for each frame its key (int64 [F]), the length of its payload (int64 [F]), the CRC32 of its
payload (uint32 [F]) and its kind (uint8 [F]), then the payloads of all frames that are not groups, one after the other.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import JournalError
from verst.journal.frames import HEADER_BYTES, BadFrame, Frame, Kind, pack_header, parse_header, read_payload, scan
from verst.journal.segments import index_path, opened, segment_path, sync_directory, write_all

_COUNTS = struct.Struct("<II")  # frames, flags
_GIVEN_UP = 1
_COLUMNS = (np.dtype("<i8"), np.dtype("<i8"), np.dtype("<u4"), np.dtype("u1"))  # keys, lengths, CRCs, kinds


@dataclass
class Rows:
    """What the index of a segment will have, gathered frame by frame while it is written or read."""

    frames: list[Frame] = field(default_factory=list)
    records: bytearray = field(default_factory=bytearray)

    def add(self, frame: Frame, payload: bytes | memoryview) -> None:
        """`payload` is needed of frames that are not groups."""
        self.frames.append(frame)
        if frame.kind is not Kind.GROUP:
            self.records += payload

    def finished(self, number: int) -> SegmentIndex:
        return SegmentIndex(
            number,
            keys_F=np.array([frame.key for frame in self.frames], np.int64),
            lengths_F=np.array([frame.length for frame in self.frames], np.int64),
            crcs_F=np.array([frame.payload_crc for frame in self.frames], np.uint32),
            kinds_F=np.array([frame.kind for frame in self.frames], np.uint8),
            records=bytes(self.records),
        )


@dataclass(frozen=True)
class SegmentIndex:
    """The frames of segment `number`, in order, and the payloads of those that are not groups, one after the other."""

    number: int
    keys_F: NDArray[np.int64]
    lengths_F: NDArray[np.int64]
    crcs_F: NDArray[np.uint32]
    kinds_F: NDArray[np.uint8]
    records: bytes
    given_up: bool = False

    @cached_property
    def all_offsets(self) -> NDArray[np.int64]:
        """Where the frames start in the segment."""
        return np.cumsum(self.lengths_F + HEADER_BYTES) - self.lengths_F - HEADER_BYTES

    @property
    def segment_bytes(self) -> int:
        return int((self.lengths_F + HEADER_BYTES).sum())

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the payloads start in `records`."""
        return _starts(self.kinds_F, self.lengths_F)

    @property
    def first_record(self) -> bytes:
        """Payload of the segment record."""
        return self.records[: int(self.lengths_F[0])]

    @property
    def file_bytes(self) -> int:
        """Size of the index file."""
        return HEADER_BYTES + _COUNTS.size + len(self.keys_F) * sum(dtype.itemsize for dtype in _COLUMNS) + len(self.records)

    def keys(self, kind: Kind) -> NDArray[np.int64]:
        return self.keys_F[self.kinds_F == kind]

    def frames(self) -> Iterator[tuple[Frame, bytes | None]]:
        """All frames with their payloads, None for groups."""
        columns = (self.kinds_F, self.keys_F, self.lengths_F, self.crcs_F, self.all_offsets, self._starts)
        for kind, key, length, crc, offset, start in zip(*(column.tolist() for column in columns), strict=True):
            payload = None if kind == Kind.GROUP else self.records[start : start + length]
            yield Frame(Kind(kind), key, 0, length, crc, offset), payload

    def payload_at(self, offset: int) -> bytes | None:
        """Payload of the frame that starts at `offset` of the segment, None if it was a group's."""
        i = int(np.searchsorted(self.all_offsets, offset))
        if self.kinds_F[i] == Kind.GROUP:
            return None
        start = int(self._starts[i])
        return self.records[start : start + int(self.lengths_F[i])]

    def same_frames(self, other: SegmentIndex) -> bool:
        """Whether both describe the same bytes."""
        return self.records == other.records and all(np.array_equal(a, b) for a, b in zip(self._columns, other._columns, strict=True))

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return (self.keys_F, self.lengths_F, self.crcs_F, self.kinds_F)

    def without_payloads(self) -> SegmentIndex:
        """The same, said to be all that is kept of the segment."""
        return replace(self, given_up=True)

    def write(self, directory: Path, *, durably: bool = False) -> int:
        """Writes the file, under its name only once it is whole, and returns its size in bytes. Raises `OSError`."""
        head = _COUNTS.pack(len(self.keys_F), _GIVEN_UP if self.given_up else 0)
        payload = b"".join((head, *(column.astype(d).tobytes() for column, d in zip(self._columns, _COLUMNS, strict=True)), self.records))
        content = pack_header(Kind.INDEX, self.number, payload, durable_bytes=self.segment_bytes) + payload
        path = index_path(directory, self.number)
        partial = path.with_name(f"{path.name}.partial")
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(file, [content], 0)
            if durably:
                os.fsync(file)
        finally:
            os.close(file)
        partial.rename(path)
        if durably:
            sync_directory(directory)
        return len(content)


class Joined:
    """The frames of consecutive segments, by kind. Many at once: for each alone, calls would take longer than what they do."""

    def __init__(self, segments: Sequence[SegmentIndex]) -> None:
        self._keys_F = np.concatenate([segment.keys_F for segment in segments])
        self._kinds_F = np.concatenate([segment.kinds_F for segment in segments])
        self._lengths_F = np.concatenate([segment.lengths_F for segment in segments])
        self._offsets_F = np.concatenate([segment.all_offsets for segment in segments])
        self._numbers_F = np.repeat([segment.number for segment in segments], [len(segment.keys_F) for segment in segments])
        self._records = b"".join(segment.records for segment in segments)
        self._starts_F = _starts(self._kinds_F, self._lengths_F)
        self._by_kind_F = np.argsort(self._kinds_F, kind="stable")
        self._ends = np.searchsorted(self._kinds_F[self._by_kind_F], np.arange(len(Kind) + 2))

    def keys(self, kind: Kind) -> NDArray[np.int64]:
        """Those of one kind, in order; so are the others."""
        return self._keys_F[self._of(kind)]

    def places(self, kind: Kind) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of their segments, and where they start in them."""
        return self._numbers_F[self._of(kind)], self._offsets_F[self._of(kind)]

    def values(self, kind: Kind) -> list[dict[str, Any]]:
        """The JSON objects of records. Not of groups."""
        spans = zip(self._starts_F[self._of(kind)].tolist(), self._lengths_F[self._of(kind)].tolist(), strict=True)
        return json.loads(b"[%b]" % b",".join(self._records[start : start + length] for start, length in spans))

    def _of(self, kind: Kind) -> NDArray[np.int64]:
        return self._by_kind_F[self._ends[kind] : self._ends[kind + 1]]


def index_of(directory: Path, number: int) -> SegmentIndex:
    """The index made anew from a finished segment, every byte verified. Raises `JournalError` if that is damaged."""
    path, rows = segment_path(directory, number), Rows()
    with opened(path) as file:
        try:
            for frame in scan(file, 0, os.fstat(file).st_size):
                rows.add(frame, b"" if frame.kind is Kind.GROUP else read_payload(file, frame.offset))
        except BadFrame as bad:
            raise JournalError(f"{path}: {bad}: restore the file from a copy") from bad
    return rows.finished(number)


def read_index(directory: Path, number: int) -> SegmentIndex:
    """The index of a segment. Raises `BadFrame` if it is damaged or of another segment, `OSError` if it cannot be read."""
    content = index_path(directory, number).read_bytes()
    frame = parse_header(content[:HEADER_BYTES], 0)
    if frame is None or frame.kind is not Kind.INDEX or frame.end != len(content):
        raise BadFrame(0, "no whole index")
    payload = memoryview(content)[HEADER_BYTES:]
    if zlib.crc32(payload) != frame.payload_crc:
        raise BadFrame(0, "corrupt index")
    if frame.key != number:
        raise BadFrame(0, f"the index of segment {frame.key}")
    found = _unpacked(number, payload)
    if found.segment_bytes != frame.durable_bytes:
        raise BadFrame(0, f"the index of a segment of {frame.durable_bytes} bytes, whose frames have {found.segment_bytes}")
    return found


def _unpacked(number: int, payload: memoryview) -> SegmentIndex:
    count, flags = _COUNTS.unpack_from(payload)
    columns: list[NDArray[Any]] = []
    offset = _COUNTS.size
    for dtype in _COLUMNS:
        columns.append(np.frombuffer(payload, dtype, count, offset))
        offset += count * dtype.itemsize
    keys_F, lengths_F, crcs_F, kinds_F = columns
    return SegmentIndex(number, keys_F, lengths_F, crcs_F, kinds_F, bytes(payload[offset:]), given_up=bool(flags & _GIVEN_UP))


def _starts(kinds_F: NDArray[np.uint8], lengths_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where payloads start that lie one after the other, those of groups left out."""
    kept_F = np.where(kinds_F == Kind.GROUP, 0, lengths_F)
    return np.cumsum(kept_F) - kept_F
