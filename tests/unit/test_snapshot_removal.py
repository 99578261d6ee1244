"""Snapshots of a run whose holder died, removed by another run on the machine before the next holder takes charge."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from verst.training.snapshots import SnapshotHolder
from verst.weights.location import LOCK, remove_abandoned


def test_a_directory_without_a_lock_is_taken_charge_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for owner in ("verst.weights.location", "verst.training.snapshots"):
        monkeypatch.setattr(f"{owner}.shared_memory", lambda: tmp_path)
    monkeypatch.setattr("verst.weights.location._REMOVAL_S", 0.2)
    directory = tmp_path / "verst-run.rank0"
    directory.mkdir()
    (directory / LOCK).touch()  # of a holder that was killed
    remove_abandoned()  # another run begins
    assert not directory.exists()
    (directory / "step-00000003.partial").mkdir(parents=True)  # the rank goes on writing
    holder = SnapshotHolder(str(directory))
    holder.open()
    with (directory / LOCK).open("r+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    remove_abandoned()
    assert directory.exists(), "it has an owner again"
    holder.close()
    assert not directory.exists()
