"""Snapshots: a trainer rank's state in the memory of its machine, for the moment when a rank is lost: a checkpoint without the disk.

`DIR/step-00000010/` holds what a checkpoint has of a rank, in shared memory, which outlives every process. A `SnapshotHolder`, a process
of its own beside the rank, says which of them are complete, keeps the newest two, lends them to other machines, and gives the memory back
when the run ends. A step may be restored only if the snapshots of all ranks are complete: the loop knows (`verst.runtime.snapshots`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from verst.errors import CheckpointError
from verst.training.checkpoints import PARTIAL, FileRecord, check_file, rank_name, step_path
from verst.weights.location import LOCK, held, remove_directory, shared_memory

if TYPE_CHECKING:
    from verst.training.checkpoints import LoadedState

KEPT = 2
"""Generations: the newest may not be complete on all ranks yet when one of them is lost."""

_RECORD = "{name}.json"
_CHUNK_BYTES = 64 << 20


def snapshot_directory(run_id: str, rank: int) -> Path:
    """Where one rank of a run keeps its snapshots."""
    return shared_memory() / f"verst-{run_id}.rank{rank}"


def load_snapshot(directory: Path, step: int, *, rank: int, world: int) -> LoadedState:
    """The state of a rank, from a complete snapshot whose every byte is looked at. Raises `CheckpointError`."""
    from verst.training.checkpoints import read_state

    path, name = step_path(directory, step), rank_name(rank, world)
    check_file(path, _record(path, name))
    return read_state(path / name)


class Peer(Protocol):
    """A holder on another machine."""

    async def call(self, method: str, /, *args: object) -> bytes: ...


class SnapshotHolder:
    """Looks after the snapshots of one trainer rank, and after copies of another's."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._open = contextlib.ExitStack()
        self._is_open = False

    def open(self) -> None:
        """Takes charge of the directory, with what is in it if another holder of this run has died. Raises `ConfigError`.

        Repeating it changes nothing.
        """
        if self._is_open:
            return
        if not self._adopt():
            self._open.enter_context(held(self._directory))
        self._is_open = True

    def _adopt(self) -> bool:
        """Whether a dead holder of the same run had left the directory, which nobody else looks after.

        Another run may have removed it meanwhile, as what a dead run has left, and a rank written into a new one, which has no lock.
        """
        path = self._directory / LOCK
        try:
            owner = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(owner), path.stat())
        except OSError:  # held, or removed at this moment
            mine = False
        if not mine:
            os.close(owner)
            return False
        self._open.callback(os.close, owner)
        self._open.callback(remove_directory, self._directory)
        return True

    def confirm(self, step: int, record: FileRecord) -> bool:
        """The rank has written its file: it is complete from here on. Removes what is older than the newest `KEPT`.

        Returns whether there is room for one more.
        """
        partial, final = step_path(self._directory, step, PARTIAL), step_path(self._directory, step)
        if partial.exists() or not _complete(final, record.name):  # else a holder had confirmed it that died before it could say so
            self._complete(partial, final, record)
        self._prune()
        return shutil.disk_usage(self._directory).free > 2 * record.nbytes

    def _complete(self, partial: Path, final: Path, record: FileRecord) -> None:
        (partial / _RECORD.format(name=record.name)).write_text(json.dumps(asdict(record)))
        if final.exists():  # the step was trained again after its snapshot was lost on another rank, or it holds another rank's copy
            for file in partial.iterdir():
                file.rename(final / file.name)
            partial.rmdir()
        else:
            partial.rename(final)

    def _prune(self) -> None:
        complete = sorted(path for path in self._directory.glob("step-*") if path.suffix != PARTIAL)
        for path in complete[:-KEPT]:
            remove_directory(path)
        for path in self._directory.glob(f"step-*{PARTIAL}"):
            if complete and path.name < complete[-1].name:  # of a rank that was lost while it wrote
                remove_directory(path)

    def steps(self) -> dict[str, list[int]]:
        """Of which complete files are here, ascending, by the file's name."""
        found: dict[str, list[int]] = {}
        for path in sorted(path for path in self._directory.glob("step-*") if path.suffix != PARTIAL):
            for record in path.glob(_RECORD.format(name="*")):
                found.setdefault(record.name.removesuffix(_RECORD.format(name="")), []).append(int(path.name.removeprefix("step-")))
        return found

    def record(self, step: int, name: str) -> FileRecord:
        """Of a complete file. Raises `CheckpointError` if it is not here."""
        return _record(step_path(self._directory, step), name)

    def read(self, step: int, name: str, offset: int, length: int) -> bytes:
        """A piece of a complete file."""
        try:
            with (step_path(self._directory, step) / name).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise CheckpointError(f"snapshot of step {step}: {name} cannot be read ({error.strerror})") from error

    async def fetch(self, peer: Peer, step: int, record: FileRecord) -> None:
        """Copies a complete file from the holder on another machine. Raises `CheckpointError`."""
        if _complete(step_path(self._directory, step), record.name):
            return
        path = step_path(self._directory, step, PARTIAL)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with (path / record.name).open("wb") as file:
                for offset in range(0, record.nbytes, _CHUNK_BYTES):
                    file.write(await peer.call("read", step, record.name, offset, min(_CHUNK_BYTES, record.nbytes - offset)))
        except OSError as error:
            raise CheckpointError(f"snapshot of step {step}: {record.name} cannot be copied to {path} ({error.strerror})") from error
        check_file(path, record)
        self.confirm(step, record)

    def close(self) -> None:
        """Gives the memory back."""
        self._open.close()


def _complete(path: Path, name: str) -> bool:
    return (path / _RECORD.format(name=name)).exists()


def _record(path: Path, name: str) -> FileRecord:
    try:
        return FileRecord(**json.loads((path / _RECORD.format(name=name)).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has no complete snapshot {name}: {error}") from error
