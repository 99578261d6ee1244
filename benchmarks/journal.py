"""What the journal costs a run: the share of a step that its writes take, and how long a large one takes to open.

    python benchmarks/journal.py [--groups 1000000] [--unconsumed 10000] [--steps 8] [--dir DIR]

Writes: groups of 8 trajectories of 4,096 tokens, 16 a step, arrive one by one during a step of 5 seconds (asleep otherwise), each with its
admission; then the batch, the commit and the publish, with their fsyncs.

    write_share   seconds in which appending held the loop, over the seconds of the steps; median over the steps
    write_s_per_mb  the same seconds, over what was written

Opening: a million groups in as many segments as they would fill at that length, consumed 16 a step. The consumed ones have payloads of
64 bytes, which opening does not read; 10,000 at the end have the whole length and no step took them.

    open_s        a process of its own reads it, after the files were dropped from the page cache
    open_warm_s   the same once more
    open_cpu_s    processor time of that
    open_mb       resident memory that the reader added
    verify_s      reading and verifying every byte, as `verst audit` does; its disk is the limit

While that journal is made nothing waits for the disk (fsync does nothing), or it would take an hour. It needs 8 GB below --dir. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verst.journal.codec import encode_group
from verst.journal.log import SEGMENT_BYTES, Journal, JournalReader
from verst.journal.records import AdmitRecord, BatchRecord, CommitRecord, PublishRecord
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

PER_STEP = 16
MEMBERS = 8
TOKENS = 4096
PROMPT_TOKENS = 256
SMALL = b"s" * 64
OPENINGS = 5  # of which the median is told
SETTLE_S = 10.0  # for a disk that was just given gigabytes
DIGEST = "0123456789abcdef" * 2


def real_group(rng: np.random.Generator) -> bytes:
    """A group of real length, as a replica sends it."""
    sampled_T = np.arange(TOKENS) >= PROMPT_TOKENS
    trajectories = tuple(
        Trajectory(
            id=f"0/{m}",
            tokens_T=rng.integers(0, 150_000, TOKENS, dtype=np.int32),
            loss_mask_T=sampled_T,
            logprobs_T=rng.standard_normal(TOKENS).astype(np.float32),
            versions_T=np.where(sampled_T, 3, -1).astype(np.int32),
            turns=(Turn(0, PROMPT_TOKENS, TOKENS, FinishReason.STOP, "word " * TOKENS),),
            messages=(Message("user", "q"), Message("assistant", "word " * TOKENS)),
            status=Status.FINISHED,
            seed=m,
            reward=1.0,
        )
        for m in range(MEMBERS)
    )
    return encode_group(Group(0, Prompt("p", (Message("user", "q"),)), trajectories, 3))


def measure_writes(directory: Path, steps: int, step_s: float, group: bytes) -> dict[str, float]:
    journal = Journal.create(directory, "writes")
    held_s: list[float] = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        seqs = range((step - 1) * PER_STEP, step * PER_STEP)
        for i, seq in enumerate(seqs):
            journal.append_admitted(AdmitRecord(seq, f"prompt-{seq}", step - 1))
            time.sleep(max(0.0, began + (i + 1) * step_s / (PER_STEP + 1) - time.perf_counter()))
            journal.append_group(seq, group)
        journal.append_batch(BatchRecord(step, tuple(seqs)))
        time.sleep(max(0.0, began + step_s - time.perf_counter()))
        journal.append_commit(CommitRecord(step, DIGEST))
        journal.append_published(PublishRecord(step, DIGEST, (0,)))
        held_s.append(journal.report()["journal/write_s"])
    mb = journal.size_bytes / 1e6
    journal.close()
    return {"write_share": median(held_s) / step_s, "write_s_per_mb": sum(held_s) / mb, "step_mb": mb / steps, "step_s": step_s}


def make(directory: Path, groups: int, unconsumed: int, group: bytes) -> None:
    """The large journal. Each of its segments has as many groups as it would have at real length."""
    per_segment = SEGMENT_BYTES // len(group)
    small_step_bytes = PER_STEP * 270 + 600  # frames and records of a step, about
    journal = Journal.create(directory, "open", segment_bytes=per_segment * small_step_bytes // PER_STEP)
    consumed = groups - unconsumed
    late = max(1, unconsumed * 4 // per_segment)  # steps taken while the unconsumed groups arrive: only batches and commits begin segments
    for seq in range(consumed):
        journal.append_admitted(AdmitRecord(seq, f"prompt-{seq}", seq // PER_STEP))
        journal.append_group(seq, SMALL)
        if (seq + 1) % PER_STEP == 0 and (seq + 1) // PER_STEP <= consumed // PER_STEP - late:
            make_step(journal)
    journal.close()
    journal = Journal.open(directory)
    for i, seq in enumerate(range(consumed, groups)):
        journal.append_admitted(AdmitRecord(seq, f"prompt-{seq}", seq // PER_STEP))
        journal.append_group(seq, group)
        if (i + 1) % (unconsumed // late) == 0 and i < unconsumed - 0.9 * per_segment:  # the last segment, which is scanned, is nearly full
            make_step(journal)
    journal.close()


def make_step(journal: Journal) -> None:
    step = journal.index.last_batch + 1
    journal.append_batch(BatchRecord(step, tuple(range((step - 1) * PER_STEP, step * PER_STEP))))
    journal.append_commit(CommitRecord(step, DIGEST))
    journal.append_published(PublishRecord(step, DIGEST, (0,)))


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_once(directory: Path) -> None:
    """Prints what opening takes in this process, as JSON."""
    before_mb, began_cpu_s, began = resident_mb(), time.process_time(), time.perf_counter()
    reader = JournalReader(directory, "open")
    took = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu_s, "mb": resident_mb() - before_mb}
    pending = len(reader.recovery(0).pending)
    print(json.dumps(took | {"groups": len(reader.index.groups), "pending": pending, "journal_mb": reader.size_bytes / 1e6}))


def opened(directory: Path) -> dict[str, float]:
    """The same in a process of its own."""
    said = subprocess.run([sys.executable, __file__, "--open", str(directory)], check=True, capture_output=True, text=True).stdout
    return json.loads(said)


def measure_opening(directory: Path, groups: int, unconsumed: int, group: bytes) -> dict[str, float]:
    began = time.perf_counter()
    with mock.patch("os.fsync"):
        make(directory, groups, unconsumed, group)
    print(f"a journal of {groups} groups was made in {time.perf_counter() - began:.0f} s", flush=True)
    drop_from_cache(directory)
    time.sleep(SETTLE_S)
    cold, warm = [], []
    for _ in range(OPENINGS):
        drop_from_cache(directory)
        cold.append(opened(directory))
        warm.append(opened(directory))
    first = cold[0]
    assert first["groups"] == groups
    began = time.perf_counter()
    JournalReader(directory, "open", verify=True)
    verify_s = time.perf_counter() - began
    segments = sorted(directory.glob("*.journal"))
    return {
        "open_s": median(each["s"] for each in cold),
        "open_warm_s": median(each["s"] for each in warm),
        "open_cpu_s": median(each["cpu_s"] for each in warm),
        "open_mb": median(each["mb"] for each in warm),
        "verify_s": verify_s,
        "groups": groups,
        "unconsumed": first["pending"],
        "segments": len(segments),
        "last_segment_mb": segments[-1].stat().st_size / 1e6,
        "journal_mb": first["journal_mb"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--unconsumed", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=8, help="of the writes (default: 8)")
    parser.add_argument("--step-s", type=float, default=5.0, help="seconds of a step (default: 5)")
    parser.add_argument("--dir", type=Path, help="where to write (default: the directory for temporary files)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # a journal to open, for the measuring process itself
    options = parser.parse_args(arguments)
    if options.open:
        return open_once(options.open)
    group = real_group(np.random.default_rng(0))
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        found = measure_writes(Path(directory) / "writes", options.steps, options.step_s, group)
        found |= {"group_mb": len(group) / 1e6} | measure_opening(Path(directory) / "open", options.groups, options.unconsumed, group)
    print(json.dumps({name: round(value, 6) for name, value in found.items()}))


if __name__ == "__main__":
    main()
