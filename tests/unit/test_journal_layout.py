"""`docs/journal.md` is enough to read a journal: the reader here knows that page, and nothing of Verst."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.loop.local import LocalRun
from tests.unit.test_audit import SOUND, rolled
from verst.journal.log import Journal, JournalReader
from verst.journal.records import Record

NAMES = {1: "SEGMENT", 2: "GROUP", 3: "BATCH", 4: "COMMIT", 5: "ADMIT", 6: "PUBLISH", 7: "CONFIG", 8: "FAULT", 9: "RECOVERY", 10: "INDEX"}
Read = tuple[str, int, bytes | None]  # kind, key, payload (None: it was given up)


def frames(content: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, key, fsynced bytes and payload of each frame of a file."""
    offset = 0
    while offset < len(content):
        magic, kind, key, fsynced, length, payload_crc, header_crc = struct.unpack_from("<4sB3xqQQII", content, offset)
        assert magic == b"VsJ1"
        assert header_crc == zlib.crc32(content[offset : offset + 36])
        payload = content[offset + 40 : offset + 40 + length]
        assert payload_crc == zlib.crc32(payload)
        yield kind, key, fsynced, payload
        offset += 40 + length


def index(content: bytes) -> tuple[int, int, list[tuple[int, int, bytes | None]]]:
    """Of an index file: size of its segment, whether that was given up, and kind, key and payload of each frame."""
    ((kind, _, segment_bytes, payload),) = frames(content)
    assert kind == 10
    count, given_up = struct.unpack_from("<II", payload)
    keys = struct.unpack_from(f"<{count}q", payload, 8)
    lengths = struct.unpack_from(f"<{count}q", payload, 8 + 8 * count)
    crcs = struct.unpack_from(f"<{count}I", payload, 8 + 16 * count)
    kinds = struct.unpack_from(f"<{count}B", payload, 8 + 20 * count)
    assert segment_bytes == sum(lengths) + 40 * count
    place, found = 8 + 21 * count, []
    for kind, key, length, crc in zip(kinds, keys, lengths, crcs, strict=True):
        record = None if kind == 2 else payload[place : place + length]
        assert record is None or zlib.crc32(record) == crc
        found.append((kind, key, record))
        place += 0 if record is None else length
    assert place == len(payload)
    return segment_bytes, given_up, found


def read(directory: Path) -> list[Read]:
    """Every record of a journal, in order."""
    found: list[Read] = []
    number = 1
    while True:
        segment, indexed = directory / f"{number:08d}.journal", directory / f"{number:08d}.index"
        if segment.exists():
            of_segment = [(kind, key, payload) for kind, key, _, payload in frames(segment.read_bytes())]
            if indexed.exists():
                size, _, of_index = index(indexed.read_bytes())
                assert size == segment.stat().st_size
                assert of_index == [(kind, key, None if kind == 2 else payload) for kind, key, payload in of_segment]
        elif indexed.exists():
            _, given_up, of_segment = index(indexed.read_bytes())
            assert given_up == 1
        else:
            return found
        assert of_segment[0][:2] == (1, number)
        found += [(NAMES[kind], key, payload) for kind, key, payload in of_segment]
        number += 1


def records(found: list[Read]) -> list[tuple[str, int]]:
    return [(kind, key) for kind, key, _ in found if kind != "SEGMENT"]


def test_a_journal_of_every_kind_of_record(tmp_path: Path):
    found = read(rolled(tmp_path))
    expected = [(item.kind.name, item.key) if isinstance(item, Record) else ("GROUP", item[0]) for item in SOUND]
    assert records(found) == expected
    heads = [json.loads(payload) for kind, _, payload in found if kind == "SEGMENT" and payload is not None]
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.journal"))]
    assert heads == [{"format": 2, "run_id": "r", "previous_bytes": before} for before in [0, *sizes[:-1]]]
    by_kind = {kind: json.loads(payload) for kind, _, payload in found if kind != "GROUP" and payload is not None}
    assert by_kind["ADMIT"] == {"seq": 6, "prompt": "p6", "version": 2}
    assert by_kind["BATCH"] == {"step": 2, "groups": [3, 4], "dropped": {}, "plan": {}}
    assert by_kind["COMMIT"] == {"step": 2, "digest": "d2", "info": {}}
    assert by_kind["PUBLISH"] == {"version": 2, "digest": "d2", "replicas": [0, 1]}
    assert by_kind["CONFIG"] == {"step": 1, "options": {"rollout.replicas": [1, 2]}}
    assert by_kind["FAULT"] == {"role": "replica 1", "reason": "exit code 137", "step": 1, "time_s": 1.0}
    assert by_kind["RECOVERY"] == {"role": "replica 1", "step": 1, "source": "replacement", "seconds": 2.5, "time_s": 2.0}


def test_what_is_left_when_segments_were_given_up(tmp_path: Path):
    before = read(rolled(tmp_path))
    assert Journal.open(tmp_path).give_up(2, 1)
    after = read(tmp_path)
    assert records(after) == records(before)
    gone = [key for kind, key, payload in after if payload is None]
    assert gone
    assert [entry for entry in after if entry[2] is not None] == [e for e in before if not (e[0] == "GROUP" and e[1] in gone)]


def test_the_journal_of_a_run(done_run: LocalRun):
    journal = JournalReader(done_run.run.journal)
    found = read(done_run.run.journal)
    assert {kind for kind, _, _ in found} == {"SEGMENT", "ADMIT", "GROUP", "BATCH", "COMMIT", "PUBLISH"}
    for _, seq, payload in (entry for entry in found if entry[0] == "GROUP"):
        assert payload is not None
        batch = pa.ipc.open_stream(payload).read_next_batch()
        meta = json.loads(batch.schema.metadata[b"verst.meta"])
        assert batch.schema.metadata[b"verst.schema"] == b"group/3"
        assert [str(column.type) for column in batch.schema] == [
            *("large_string", "large_list<item: int32>", "large_list<item: uint8>", "large_list<item: int32>", "large_list<item: float>"),
            *("double", "large_binary", "large_list<item: float>", "int32"),
        ]
        expected = journal.group(seq)
        assert (meta["seq"], meta["prompt"]["id"], meta["admitted_version"]) == (seq, expected.prompt.id, expected.admitted_version)
        for row, detail, trajectory in zip(batch.to_pylist(), meta["details"], expected.trajectories, strict=True):
            assert (row["id"], row["reward"], detail["status"]) == (trajectory.id, trajectory.reward, trajectory.status)
            for name in ("tokens_T", "loss_mask_T", "versions_T"):
                assert row[name] == getattr(trajectory, name).tolist()
            assert row["logprobs_T"] == pytest.approx(trajectory.logprobs_T.tolist())
