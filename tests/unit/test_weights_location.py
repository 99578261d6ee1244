"""Published weights in shared memory: freed when their run is dead, never while it lives."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.processes import copies
from verst.errors import ConfigError
from verst.weights import location
from verst.weights.location import held, publish_directory, remove_abandoned, version_file


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(location, "_SHARED_MEMORY", tmp_path)
    return tmp_path


def _hold(directory: Path, shared: Path, ready: Connection) -> None:
    location._SHARED_MEMORY = shared
    with held(directory):
        version_file(directory, 1).write_bytes(b"weights")
        ready.send(True)
        signal.pause()


class Owner:
    """A process that holds a run's weights."""

    def __init__(self, run_id: str, shared: Path) -> None:
        self.directory = publish_directory(run_id, None)
        ready, theirs = multiprocessing.Pipe(duplex=False)
        self._process = copies().Process(target=_hold, args=(self.directory, shared, theirs))
        self._process.start()
        assert ready.poll(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(60)
        assert not self._process.is_alive()


@pytest.fixture
def owner(shared: Path) -> Iterator[Owner]:
    owner = Owner("theirs", shared)
    yield owner
    owner.kill()


@pytest.mark.parametrize("where", [None, "disk"])
def test_weights_of_a_killed_run_are_freed_by_the_next_run_and_those_of_a_living_one_are_not(owner: Owner, shared: Path, where: str | None):
    weights = version_file(owner.directory, 1)
    with held(publish_directory("mine", None)):
        assert weights.is_file()
    owner.kill()
    assert weights.is_file(), "SIGKILL leaves them: otherwise this test proves nothing"
    with held(publish_directory("mine", where if where is None else str(shared / where))):
        assert not owner.directory.exists()


def test_a_resumed_run_takes_its_own_place_again(owner: Owner):
    owner.kill()
    with held(owner.directory):
        assert not version_file(owner.directory, 1).exists()
        remove_abandoned()
        assert owner.directory.is_dir()
    assert not owner.directory.exists()


def test_the_place_of_a_living_run_cannot_be_taken(owner: Owner, shared: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(location, "_REMOVAL_S", 0.2)
    with pytest.raises(ConfigError, match=r"weights\.location: cannot make .*verst-theirs"), held(owner.directory):
        pass
    assert version_file(owner.directory, 1).is_file()
    assert [path.name for path in shared.iterdir()] == ["verst-theirs"]


def test_what_is_not_ours_is_left_alone(shared: Path, monkeypatch: pytest.MonkeyPatch):
    (shared / "verst-notes").mkdir()
    (shared / "verst-file").write_text("")
    dead = shared / "verst-dead"
    dead.mkdir()
    (dead / location.LOCK).write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: -1)
        remove_abandoned()
        assert dead.exists(), "it is another user's"
    remove_abandoned()
    assert sorted(path.name for path in shared.iterdir()) == ["verst-file", "verst-notes"]


def test_weights_on_a_disk_are_made_anew_without_touching_their_neighbours(tmp_path: Path):
    disk = tmp_path / "disk"
    mine, neighbour = publish_directory("mine", str(disk)), publish_directory("other", str(disk))
    for directory in (mine, neighbour):
        directory.mkdir(parents=True)
        (directory / location.LOCK).write_text("")
        version_file(directory, 3).write_bytes(b"old")
    with held(mine):
        assert not version_file(mine, 3).exists()
        assert version_file(neighbour, 3).exists()
    assert not mine.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"weights\.location: cannot make .*Not a directory"), held(tmp_path / "file" / "x" / "verst-r"):
        pass
