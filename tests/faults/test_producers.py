"""A part of the loop that breaks: it is named, the run ends in order, and nothing that it had is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.loop.fakes import EndingStream, FakeParts, config, group
from tests.loop.local import local_run
from verst.errors import DataError, DeadlineExceeded, JournalError
from verst.journal.log import Journal, JournalReader
from verst.runtime.loop import Loop
from verst.runtime.parts import Parts
from verst.runtime.recovery import Cursor, Restored
from verst.runtime.trainer_worker import Published
from verst.runtime.transfer import Brought
from verst.runtime.wait import within


def loop_of(parts: FakeParts) -> Loop:
    return Loop(parts.config, cast(Parts, parts), Restored(0, Cursor(0, parts.stream.state())))


async def run(parts: FakeParts) -> None:
    await asyncio.wait_for(loop_of(parts).run(), 20)


async def test_a_source_that_breaks_ends_the_run_with_its_own_error(tmp_path: Path):
    """A defect is shown as it is, with its traceback; not as "unhandled errors in a TaskGroup"."""
    parts = FakeParts(config(), tmp_path)
    parts.stream = EndingStream(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        await run(parts)


async def test_a_full_disk_under_the_journal_ends_the_run_and_loses_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    append = Journal.append_group

    def full(self: Journal, seq: int, payload: bytes) -> None:
        if seq == 3:
            raise JournalError("journal/00000001.log: no space left on device: make room, then resume the run")
        append(self, seq, payload)

    monkeypatch.setattr(Journal, "append_group", full)
    parts = FakeParts(config(), tmp_path)
    with pytest.raises(JournalError, match="no space left on device"):
        await run(parts)
    assert parts.journal.index.last_commit == 1
    assert set(parts.journal.index.groups) >= {0, 1}
    assert 3 not in parts.journal.index.groups
    parts.journal.close()
    assert JournalReader(tmp_path / "journal").recovery(0).retrain[0][0] == 1  # what is on disk is whole


@pytest.mark.usefixtures("_one_thread")
async def test_prompts_from_python_that_raise_are_named_when_they_are_needed(tmp_path: Path, model: Path):
    class Rows:
        def __iter__(self) -> Iterator[dict[str, str]]:
            for i in range(9):
                yield {"prompt": f"count {i}", "answer": "1"}
            raise KeyError("the database has gone")

    run = local_run(tmp_path, model, {}, reward=lambda trajectory, fields: float(len(trajectory.completion)), prompts=Rows())
    with pytest.raises(DataError, match=r"rows\[9\] raised KeyError: 'the database has gone' \(.*test_producers\.py:\d+"):
        await run.go()
    assert JournalReader(run.run.journal).index.last_commit == 2  # the first eight made two steps
    assert "ended by DataError: rows[9] raised KeyError" in run.run.log.read_text()


async def test_a_pull_that_never_ends_tells_who_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = config(rollout={"group_size": 2, "capacity_groups": 4, "deadline_s": 5.0})
    parts = FakeParts(cfg, tmp_path)
    bring = parts.bring

    async def stuck(published: Published, probe_T: Any) -> Brought:
        if published.manifest.version == 1:
            await within(asyncio.sleep(60), 0.5, "replica 1: pull")
        return await bring(published, probe_T)

    parts.bring = stuck
    with pytest.raises(DeadlineExceeded) as ended:
        await run(parts)
    lines = [line.strip() for line in str(ended.value).splitlines()]
    assert lines[:2] == ["waited 0.5 s for replica 1: pull", "who waits for whom:"]
    assert any(line.startswith("the loop waits for engines to pull version 1 (") for line in lines)
    assert any(line.startswith("the feed waits for a free slot (") for line in lines)
    assert any(line.startswith("2 groups wait for the engines to have version 1 (") for line in lines)
    assert "4 of 4 group slots are held:" in lines
    assert str(ended.value).count("who waits for whom") == 1


async def test_the_last_of_all_limits_names_every_group(tmp_path: Path):
    async def hang() -> None:
        await asyncio.sleep(60)

    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: hang() if seq == 0 else group(seq, v))
    parts.group_deadline_s = 0.3

    async def standing() -> dict[int, tuple[str, float]]:
        return {0: ("the engine of replica 2", 0.3)}

    parts.standing = standing
    with pytest.raises(DeadlineExceeded) as ended:
        await run(parts)
    text = str(ended.value)
    assert text.startswith("waited 0.3 s for the next of 2 groups (0 are ready)\nwho waits for whom:\n")
    assert "group 0 waits for the engine of replica 2 (0.3 s)" in text
    assert "group 1 waits for its turn" in text


async def test_a_run_says_when_asked_who_waits_for_whom(tmp_path: Path):
    late = asyncio.Event()

    async def wait(seq: int, version: int) -> Any:
        await late.wait()
        return group(seq, version)

    parts = FakeParts(config(), tmp_path, roll=lambda seq, v: wait(seq, v) if seq == 3 else group(seq, v))
    loop = loop_of(parts)
    running = asyncio.create_task(loop.run())
    await parts.reported(1)
    async with asyncio.timeout(5):
        while "group 2 waits for the rest of its batch" not in "".join(lines := await loop.standing()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    text = "\n".join(lines)
    assert "the loop waits for the next of 2 groups (1 are ready) (" in text
    assert "the feed waits for a free slot (" in text
    late.set()
    await asyncio.wait_for(running, 10)
    assert "0 of 2 group slots are held" in "\n".join(await loop.standing())


async def test_a_step_that_waits_unusually_long_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.runtime.standing._LONG_WAIT_S", 0.2)

    async def late(seq: int, version: int) -> Any:
        await asyncio.sleep(1.0 if seq == 8 else 0.0)
        return group(seq, version)

    parts = FakeParts(config(run={"steps": 6}), tmp_path, roll=late)
    await run(parts)
    (line,) = [note for note in parts.notes if "has waited for its groups" in note]
    assert line.startswith("step 5 has waited for its groups for 0 s (usually 0.0 s): ")
    assert "group 8 waits for a replica" in line
