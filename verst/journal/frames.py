"""The bytes of a journal segment: a row of frames, each a 40-byte header and a payload, both under CRC32.

A header says how many bytes of its segment were durable (fsynced) when it was written. That tells a torn tail from damage: a bad frame
can be the trace of a crash only if no later frame says that its bytes had reached the disk.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_HEADER = struct.Struct("<4sB3xqQQI")  # magic, kind, key, durable bytes, payload length, payload CRC
_CRC = struct.Struct("<I")  # of the header before it
HEADER_BYTES = _HEADER.size + _CRC.size

_MAGIC = b"VsJ1"
_CHUNK_BYTES = 1 << 20


class Kind(IntEnum):
    """What a frame holds."""

    SEGMENT = 1  # JSON, first in each segment: format, run id, size of the segment before; key: segment number
    GROUP = 2  # an Arrow stream of `codec.encode_group`; key: the group's seq
    BATCH = 3  # JSON of a `BatchRecord`; key: step
    COMMIT = 4  # JSON of a `CommitRecord`; key: step
    ADMIT = 5  # JSON of an `AdmitRecord`; key: the group's seq
    PUBLISH = 6  # JSON of a `PublishRecord`; key: version
    CONFIG = 7  # JSON of a `ConfigRecord`; key: the last committed step
    FAULT = 8  # JSON of a `FaultRecord`; key: the last committed step
    RECOVERY = 9  # JSON of a `RecoveryRecord`; key: the step that was restored
    INDEX = 10  # alone in an index file: a `SegmentIndex`; key: number of its segment, whose size is in place of the durable bytes


_KINDS = frozenset(map(int, Kind))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame's header, and the byte of the segment at which it starts."""

    kind: Kind
    key: int
    durable_bytes: int
    length: int
    payload_crc: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + HEADER_BYTES + self.length


class BadFrame(Exception):
    """No intact frame starts at `offset`, though bytes are there."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset
        self.reason = reason


def pack_header(kind: Kind, key: int, payload: bytes | memoryview, *, durable_bytes: int) -> bytes:
    """The header to write before `payload`."""
    length = memoryview(payload).nbytes
    head = _HEADER.pack(_MAGIC, kind, key, durable_bytes, length, zlib.crc32(payload))
    return head + _CRC.pack(zlib.crc32(head))


def parse_header(raw: bytes, offset: int) -> Frame | None:
    """The frame that begins with these bytes, at `offset` of its file; None if they are no intact header."""
    if len(raw) != HEADER_BYTES or raw[:4] != _MAGIC:
        return None
    if _CRC.unpack_from(raw, _HEADER.size)[0] != zlib.crc32(raw[: _HEADER.size]):
        return None
    _, kind, key, durable_bytes, length, payload_crc = _HEADER.unpack_from(raw)
    if kind not in _KINDS:
        return None
    return Frame(Kind(kind), key, durable_bytes, length, payload_crc, offset)


def read_payload(file: int, offset: int) -> bytes:
    """Payload of the frame at `offset` of an open segment, verified. Raises `BadFrame`."""
    frame = _read_header(file, offset)
    payload = os.pread(file, frame.length, offset + HEADER_BYTES)
    if len(payload) != frame.length or zlib.crc32(payload) != frame.payload_crc:
        raise BadFrame(offset, "corrupt payload")
    return payload


def read_frame(file: int, offset: int, size: int) -> tuple[Frame, bytes]:
    """The frame at `offset` of an open segment of `size` bytes, and its payload, both verified. Raises `BadFrame`."""
    frame = _read_header(file, offset)
    if frame.end > size:
        raise BadFrame(offset, "incomplete frame")
    return frame, read_payload(file, offset)


def scan(file: int, start: int, size: int) -> Iterator[Frame]:
    """Every intact frame of the bytes `[start, size)`, in order, in bounded memory. Raises `BadFrame` at the first that is not."""
    offset = start
    while offset < size:
        frame = _read_header(file, offset)
        if frame.end > size:
            raise BadFrame(offset, "incomplete frame")
        if _payload_crc(file, frame) != frame.payload_crc:
            raise BadFrame(offset, "corrupt payload")
        yield frame
        offset = frame.end


def durable_after(file: int, start: int, size: int) -> int:
    """The largest `durable_bytes` of any intact header in the bytes `[start, size)`, wherever it starts; 0 without one."""
    durable, position = 0, start
    while position < size:
        chunk = os.pread(file, min(_CHUNK_BYTES, size - position), position)
        if not chunk:
            break
        found = chunk.find(_MAGIC)
        while found >= 0:
            frame = parse_header(os.pread(file, HEADER_BYTES, position + found), position + found)
            durable = max(durable, frame.durable_bytes if frame else 0)
            found = chunk.find(_MAGIC, found + 1)
        at_end = position + len(chunk) >= size
        position += len(chunk) if at_end else max(1, len(chunk) - len(_MAGIC) + 1)  # a magic may lie across two chunks
    return durable


def _payload_crc(file: int, frame: Frame) -> int:
    crc, position = 0, frame.offset + HEADER_BYTES
    while position < frame.end:
        chunk = os.pread(file, min(_CHUNK_BYTES, frame.end - position), position)
        if not chunk:
            raise BadFrame(frame.offset, "incomplete frame")
        crc = zlib.crc32(chunk, crc)
        position += len(chunk)
    return crc


def _read_header(file: int, offset: int) -> Frame:
    raw = os.pread(file, HEADER_BYTES, offset)
    frame = parse_header(raw, offset)
    if frame is None:
        raise BadFrame(offset, "incomplete header" if len(raw) < HEADER_BYTES else "corrupt header")
    return frame
