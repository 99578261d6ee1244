"""A run whose checkpoints or journal were damaged on disk: what it resumes from, what it says, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.loop.local import LocalRun, local_run, prompts_file, stopped_after
from tests.loop.test_run import digests
from verst.errors import JournalError
from verst.runtime.rundir import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_one_thread")]

STEPS = 4


def flip(path: Path, at: float = 0.5) -> None:
    """One bit, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("rank-00000-of-00001.safetensors", flip, "is corrupt: its SHA-256 is not that of the manifest"),
    ("rank-00000-of-00001.safetensors", shorten, "bytes instead of"),
    ("rank-00000-of-00001.safetensors", Path.unlink, "cannot be read"),
    ("loop.json", flip, "is corrupt"),
    ("manifest.json", flip, "has a damaged manifest"),
    ("manifest.json", shorten, "has a damaged manifest"),
    ("manifest.json", Path.unlink, "has no readable manifest"),
]


def copy_of(run: LocalRun, name: str) -> LocalRun:
    root = run.run.root.with_name(name)
    shutil.copytree(run.run.root, root)
    return LocalRun(RunDirectory(root))


async def test_a_run_goes_on_from_an_older_checkpoint_and_says_so(tmp_path: Path, model: Path):
    values = {
        "run": {"name": "whole", "dir": str(tmp_path), "steps": STEPS, "seed": 1},
        "data": {"path": prompts_file(tmp_path)},
        "reward": {"function": "tests.loop.rewards:spread"},
        "checkpoint": {"every_steps": 1, "keep": 2, "export_final": False},
    }
    whole = await local_run(tmp_path, model, values).go()
    cut = local_run(tmp_path, model, values | {"run": values["run"] | {"name": "cut"}})
    await stopped_after(cut, 3)
    checkpoints = sorted(path.parent for path in cut.run.checkpoints.glob("step-????????/manifest.json"))
    assert len(checkpoints) == 2
    for number, (name, damage, said) in enumerate(DAMAGES):
        run = copy_of(cut, f"damaged-{number}")
        damage(run.run.checkpoints / checkpoints[-1].name / name)
        await run.go()
        told = [line for line in run.lines if "checkpoint skipped: " in line]
        assert len(told) == 1, (name, run.lines)
        assert checkpoints[-1].name in told[0]
        assert said in told[0]
        assert digests(run) == digests(whole), name
    await _all_of_them(copy_of(cut, "all"), digests(whole))
    await _the_journal(copy_of(cut, "journal"))


async def _all_of_them(run: LocalRun, expected: object) -> None:
    """Without any checkpoint all journaled steps are trained again, from the model."""
    for file in run.run.checkpoints.glob("step-*/loop.json"):
        flip(file)
    await run.go()
    assert sum("checkpoint skipped: " in line for line in run.lines) == 2
    assert digests(run) == expected


async def _the_journal(run: LocalRun) -> None:
    """Damage in what was committed is named with file and byte; the run does not start, and nothing is written over."""
    (segment,) = run.run.journal.glob("*.journal")
    flip(segment, at=0.3)
    before = segment.read_bytes()
    with pytest.raises(JournalError, match=rf"{segment.name}.* at byte \d+"):
        await run.go()
    assert segment.read_bytes() == before
