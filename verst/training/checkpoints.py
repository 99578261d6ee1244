"""Checkpoints that exist whole or not at all.

`DIR/step-00000010/` holds one safetensors file for each trainer rank, `loop.json` (where the loop stood) and `manifest.json` (sizes and
SHA-256 of the others, and the model's fingerprint). Ranks write into `step-00000010.partial`; when all are done the directory is renamed.
So a crash or a full disk at any moment leaves the former checkpoints as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verst.errors import CheckpointError

if TYPE_CHECKING:  # the loop's process reads manifests only: it must not need torch
    import torch

    from verst.protocols import BackendState

FORMAT = 1
PARTIAL = ".partial"
"""Ends the name of a directory that is not complete yet."""

_LOOP = "loop.json"
_MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22
_NAMED = 5  # tensors a message names

# https://huggingface.co/docs/safetensors: name of each type in a file's header.
_SAFETENSORS_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written completely, as the manifest lists it."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    path: Path
    step: int
    world: int  # ranks that wrote it
    loop: Mapping[str, Any]
    fingerprint: Mapping[str, str]


@dataclass
class LoadedState:
    """A `BackendState` read back: this rank's own shards if as many ranks load as saved, else full tensors.

    `files` are those of all ranks that saved, in order: safetensors, whose header holds `values` as JSON.
    """

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]
    full_shapes: Mapping[str, tuple[int, ...]]
    files: tuple[Path, ...] = ()


class CheckpointWriter:
    """Writes one rank's file of one checkpoint, or snapshot, in a background thread."""

    def __init__(self, directory: Path, step: int, *, rank: int, world: int) -> None:
        self._path = step_path(directory, step, PARTIAL) / rank_name(rank, world)
        self._result: Future[FileRecord] | None = None

    def begin(self, state: BackendState) -> None:
        """Begins to write `state`, which must stay as it is until `finish` returns. Never raises for the disk's sake."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._result = thread.submit(write_file, self._path, _safetensors(state))
        thread.shutdown(wait=False)

    def finish(self) -> FileRecord:
        """Waits for the file. Raises `CheckpointError` if it could not be written; its remains are removed."""
        if self._result is None:
            raise CheckpointError(f"{self._path}: finish() before begin(): nothing was written")
        return self._result.result()


def fingerprint(state: BackendState) -> dict[str, str]:
    """What identifies a model: type and full shape of every tensor, by name. The same for any number of ranks."""
    return {
        name: f"{_dtype_name(tensor)}{list(state.full_shapes.get(name, tensor.shape))}" for name, tensor in sorted(state.tensors.items())
    }


def commit_checkpoint(
    directory: Path,
    step: int,
    records: Sequence[FileRecord],
    *,
    fingerprint: Mapping[str, str],
    loop: Mapping[str, Any],
    keep: int,
    besides: Sequence[int] = (),
) -> Path:
    """Makes a checkpoint of the files that all ranks have written, durable on return; removes all but the newest `keep`, and `besides`.

    `records` come from `CheckpointWriter.finish`, one for each rank; `loop` holds JSON values. Returns the checkpoint's directory.
    Raises `CheckpointError` if a rank's file is missing or something could not be written; former checkpoints are then untouched.
    """
    partial, final = step_path(directory, step, PARTIAL), step_path(directory, step)
    _require_all_ranks(partial, records)
    loop_record = write_file(partial / _LOOP, [json.dumps(dict(loop), indent=1).encode()])
    manifest = {
        "format": FORMAT,
        "step": step,
        "world": len(records),
        "files": [asdict(record) for record in (*records, loop_record)],
        "fingerprint": dict(fingerprint),
    }
    write_file(partial / _MANIFEST, [_sealed(manifest)])
    try:
        for stray in {path.name for path in partial.iterdir()} - {_MANIFEST, *(item["name"] for item in manifest["files"])}:
            (partial / stray).unlink()  # of an attempt with another number of ranks
        _sync_directory(partial)
        if final.exists():  # a step trained again after its checkpoint was found corrupt
            _remove(final)
        partial.rename(final)
        _sync_directory(directory)
    except OSError as error:
        raise CheckpointError(f"checkpoint {final} could not be completed: {error}") from error
    prune(directory, step, keep, besides)
    return final


def discard_partial(directory: Path, step: int) -> None:
    """Removes what a failed attempt has left of this step's checkpoint."""
    shutil.rmtree(step_path(directory, step, PARTIAL), ignore_errors=True)


def latest_checkpoint(directory: Path, fingerprint: Mapping[str, str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is right, and why newer ones were skipped. None if there is none.

    Raises `CheckpointError` naming the tensors that differ if it is of another model than `fingerprint` tells (None: not compared).
    """
    skipped: list[str] = []
    for path in sorted((path for path in directory.glob("step-*") if path.suffix != PARTIAL), reverse=True):
        try:
            checkpoint = verified(path)
        except CheckpointError as error:
            skipped.append(f"checkpoint skipped: {error}")
            continue
        if fingerprint is not None:
            _require_same_model(checkpoint, fingerprint)
        return checkpoint, skipped
    return None, skipped


def load_state(directory: Path, step: int, *, rank: int, world: int) -> LoadedState:
    """The state of `rank` of `world` ranks from one checkpoint, which may have been written by another number of ranks.

    `latest_checkpoint` has verified every byte, for all ranks at once; here only the files' sizes are looked at again.

    With the same number a rank gets back the tensors and values it had saved. With another it gets full tensors, joined along dim 0, and
    the values (random numbers among them) of the saved rank with its number, or of rank 0 if there was none. A state without `full_shapes`
    is never joined: its backend reads what it needs from `files`.
    Raises `CheckpointError` if a file is missing or has another size, or the shards do not make up the full shapes.
    """
    path = step_path(directory, step)
    manifest = _read_manifest(path)
    saved_world = manifest["world"]
    names = [rank_name(saved, saved_world) for saved in range(saved_world)]
    for record in manifest["files"]:
        if record["name"] in names:
            _require_size(path, FileRecord(**record))
    files = tuple(path / name for name in names)
    own = replace(read_state(files[rank if rank < saved_world else 0]), files=files)
    if saved_world == world or not own.full_shapes:
        return own
    states = [read_state(file) for file in files]
    tensors = {}
    for name in dict.fromkeys(name for state in states for name in state.tensors):
        parts = [state.tensors[name] for state in states if name in state.tensors]
        tensors[name] = _join(f"{path}: {name}", parts, own.full_shapes.get(name, tuple(parts[0].shape)))
    return replace(own, tensors=tensors)


def step_path(directory: Path, step: int, suffix: str = "") -> Path:
    """Where the checkpoint of a step lies."""
    return Path(directory) / f"step-{step:08d}{suffix}"


def rank_name(rank: int, world: int) -> str:
    """The name of one rank's file."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _safetensors(state: BackendState) -> Iterator[bytes | memoryview]:
    """The state as a safetensors file, piece by piece, without a second copy of it in memory."""
    import torch

    metadata = {"values": json.dumps(dict(state.values)), "full_shapes": json.dumps({n: list(s) for n, s in state.full_shapes.items()})}
    header: dict[str, Any] = {"__metadata__": metadata}
    # Wide types first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(state.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        dtype = _SAFETENSORS_TYPES.get(_dtype_name(tensor))
        if dtype is None:
            raise CheckpointError(f"{name} has type {tensor.dtype}, which checkpoints cannot hold")
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def read_state(path: Path) -> LoadedState:
    """The state in one rank's file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    full_shapes = {name: tuple(shape) for name, shape in json.loads(metadata["full_shapes"]).items()}
    return LoadedState(tensors, json.loads(metadata["values"]), full_shapes)


def _join(what: str, parts: Sequence[torch.Tensor], full_shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if all(tuple(part.shape) == full_shape for part in parts):  # every rank holds all of it
        return parts[0]
    shapes = [tuple(part.shape) for part in parts]
    if any(shape[1:] != full_shape[1:] for shape in shapes) or sum(shape[0] for shape in shapes if shape) != full_shape[0]:
        raise CheckpointError(f"{what} was saved in shards of shapes {shapes}, which do not make up {full_shape} along dim 0")
    return torch.cat(list(parts))


def write_file(path: Path, pieces: Iterator[bytes | memoryview] | Sequence[bytes | memoryview]) -> FileRecord:
    """Writes a file, durable on return. Raises `CheckpointError`; its remains are removed."""
    digest, nbytes = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in pieces:
                nbytes += len(piece)
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise _write_error(path, nbytes, error) from error
    return FileRecord(path.name, nbytes, digest.hexdigest())


def _write_error(path: Path, nbytes: int, error: OSError) -> CheckpointError:
    existing = next(parent for parent in path.parents if parent.exists())
    return CheckpointError(
        f"{path} could not be written ({error.strerror}; at least {nbytes} bytes are needed, {shutil.disk_usage(existing).free} are free). "
        "Former checkpoints are intact. Make room, or lower checkpoint.keep"
    )


def _require_all_ranks(partial: Path, records: Sequence[FileRecord]) -> None:
    needed = [rank_name(rank, len(records)) for rank in range(len(records))]
    if sorted(record.name for record in records) != needed or not records:
        raise CheckpointError(f"{partial}: ranks have written {[record.name for record in records]}, all of {needed} are needed")
    for record in records:
        found = partial / record.name
        if not found.exists() or found.stat().st_size != record.nbytes:
            raise CheckpointError(
                f"{found} is missing or shorter than the {record.nbytes} bytes its rank has written: is DIR a shared disk?"
            )


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's JSON with a hash of itself, so that a damaged manifest is not taken for that of another model."""
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1).encode()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{path} has no readable manifest ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged manifest") from error
    if seal != _seal(manifest):
        raise CheckpointError(f"{path} has a damaged manifest")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest['format']}, this version of Verst reads {FORMAT}")
    return manifest


def verified(path: Path) -> Checkpoint:
    """The checkpoint in this directory, once every byte was looked at. Raises `CheckpointError`."""
    manifest = _read_manifest(path)
    for record in manifest["files"]:
        check_file(path, FileRecord(**record))
    loop = json.loads((path / _LOOP).read_bytes())
    return Checkpoint(path, manifest["step"], manifest["world"], loop, manifest["fingerprint"])


def _require_size(path: Path, record: FileRecord) -> None:
    try:
        found_bytes = (path / record.name).stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path / record.name} cannot be read ({error.strerror})") from error
    if found_bytes != record.nbytes:
        raise CheckpointError(f"{path / record.name} has {found_bytes} bytes instead of {record.nbytes}")


def check_file(path: Path, record: FileRecord) -> None:
    """Raises `CheckpointError` unless the file of this record in the directory `path` has every byte that was written."""
    _require_size(path, record)
    digest = hashlib.sha256()
    try:
        with (path / record.name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path / record.name} cannot be read ({error.strerror})") from error
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(f"{path / record.name} is corrupt: its SHA-256 is not that of the manifest")


def _require_same_model(checkpoint: Checkpoint, fingerprint: Mapping[str, str]) -> None:
    saved = checkpoint.fingerprint
    differing = [
        f"{name} ({saved.get(name, 'absent')} in the checkpoint, {fingerprint.get(name, 'absent')} in the model)"
        for name in sorted({*saved, *fingerprint})
        if saved.get(name) != fingerprint.get(name)
    ]
    if differing:
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {', '.join(differing[:_NAMED])}{more}. "
            "Set model.path to the model the run began with, or start another run"
        )


def prune(directory: Path, step: int, keep: int, besides: Sequence[int] = ()) -> None:
    """Removes checkpoints before the newest `keep` up to `step`, but not `besides`, and what crashes left. What stays is tried again."""
    newest = step_path(directory, step).name
    known = sorted(path for path in directory.glob("step-*") if path.name[: len(newest)] <= newest)
    for path in {*[path for path in known if path.suffix != PARTIAL][:-keep]} - {step_path(directory, one) for one in besides}:
        with suppress(OSError):
            _remove(path)
    for path in known:
        if path.suffix == PARTIAL:
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Takes a checkpoint out of sight first, so that a half-removed one is never mistaken for one that went bad."""
    doomed = path.with_name(f"{path.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
