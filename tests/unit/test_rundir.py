"""Run directories: whole or not there, and what they say of themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError, RunLocked
from verst.journal.lock import RunLock
from verst.journal.log import Journal, JournalReader
from verst.runtime import rundir
from verst.runtime.rundir import RunDirectory

STREAM = {"epoch": 0, "window": 0, "row": 0, "of": {"seed": 0}}


def config(directory: Path) -> Config:
    return load_config({"run": {"name": "r", "dir": str(directory), "steps": 3}, "model": {"path": "m"}})


def create(directory: Path) -> RunDirectory:
    return RunDirectory.create(config(directory), b"packed", STREAM)


def test_a_new_run_is_whole_and_says_what_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"mods{os.pathsep}/elsewhere")
    run = create(tmp_path / "runs")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["r"]
    reopened, read = RunDirectory.open(run.root)
    assert read.model.path == str(tmp_path / "m")
    assert (reopened.run_id, reopened.stream, reopened.cwd) == (run.run_id, STREAM, tmp_path)
    assert reopened.extensions.read_bytes() == b"packed"
    JournalReader(run.journal, run.run_id)
    monkeypatch.chdir("/")
    monkeypatch.setenv("PYTHONPATH", f"/later{os.pathsep}/elsewhere")
    assert reopened.module_path == [str(tmp_path), str(tmp_path / "mods"), "/elsewhere", "/later"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("run", r"exists already: continue it with `verst resume .*/r`"),
        ("file", r"exists already and is no run but a file: choose another run\.name"),
        ("empty", r"is no run but an empty directory"),
        ("other", r"is no run but a directory without run\.json"),
        ("link", r"is no run but a broken link"),
    ],
)
def test_what_is_in_the_place_is_named_and_left_alone(tmp_path: Path, kind: str, message: str):
    place = tmp_path / "r"
    if kind == "run":
        create(tmp_path)
    elif kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
    if kind == "other":
        (place / "notes").write_text("mine")
    before = sorted(p.name for p in place.iterdir()) if place.is_dir() else None
    with pytest.raises(ConfigError, match=message) as caught:
        create(tmp_path)
    assert ("resume" in str(caught.value)) == (kind == "run")
    assert (sorted(p.name for p in place.iterdir()) if place.is_dir() else None) == before
    assert not (tmp_path / "r.partial").exists()


def test_a_start_that_was_killed_leaves_no_run_and_the_next_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    def dies(*_: Any) -> Journal:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "create", dies)
        with pytest.raises(Killed):
            create(tmp_path)
    assert (tmp_path / "r.partial" / "config.yaml").is_file(), "nothing was left to clear"
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match=r"r\.partial is a directory without run\.json, not a run"):
        RunDirectory.open(tmp_path / "r.partial")
    RunDirectory.open(create(tmp_path).root)
    assert not (tmp_path / "r.partial").exists()


def test_two_starts_of_one_name_do_not_mix(tmp_path: Path):
    with RunLock(tmp_path / "r.partial"), pytest.raises(RunLocked, match=r"r\.partial is in use by process"):
        create(tmp_path)
    create(tmp_path)


@pytest.mark.parametrize("when", ["config.yaml", "run.json"])
def test_a_full_disk_is_a_diagnosis_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    real = rundir._write

    def write(path: Path, content: bytes) -> None:
        if path.name == when:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(content)
        real(path, content)

    monkeypatch.setattr(rundir, "_write", write)
    with pytest.raises(ConfigError, match=r"run\.dir: cannot make .*r\.partial.* \(No space left on device\): make room"):
        create(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir: cannot make .*\(Not a directory\)"):
        create(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "a directory without run.json"), ("{", r"run\.json cannot be read"), ('{"format": 1}', "has run format 1")],
)
def test_what_is_no_run_cannot_be_opened(tmp_path: Path, content: str | None, message: str):
    run = create(tmp_path)
    described = run.root / "run.json"
    described.unlink() if content is None else described.write_text(content)
    with pytest.raises(ConfigError, match=message):
        RunDirectory.open(run.root)
    with pytest.raises(ConfigError, match="is nothing that exists, not a run"):
        RunDirectory.open(tmp_path / "none")
