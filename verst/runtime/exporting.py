"""A run's model as a Hugging Face directory, with the very weights that were committed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verst.config.hub import with_local_model
from verst.config.schema import Config
from verst.errors import CheckpointError, ConfigError
from verst.journal.log import JournalReader
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import checkpoint_of, committed_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the model lies, of which step it is, what it was made from ("final" or "checkpoint"), and its weights hash."""

    path: Path
    step: int
    source: str
    digest: str


def export_run(path: str | Path, out: str | Path, step: int | None = None) -> Exported:
    """Writes the weights of one step (default: the last that is stored) with the model's config and tokenizer to a new directory.

    The weights hash is compared with the one that the journal has of that step before the directory appears under its name.

    Raises:
        ConfigError: `path` is no run, or `out` exists already.
        CheckpointError: there is no checkpoint of that step, its weights are not those committed, or the place cannot be written.
    """
    run, config = RunDirectory.open(path)
    out = Path(out).expanduser().absolute()
    for place in (out, out.with_name(f"{out.name}.partial")):
        if os.path.lexists(place):
            raise ConfigError(f"{place} exists already: give another --out, nothing is written over")
    return _final(run, out, step) or _from_checkpoint(run, config, out, step)


def _final(run: RunDirectory, out: Path, step: int | None) -> Exported | None:
    """Copies the run's own final export, if it is of the step that is asked for."""
    last = JournalReader(run.journal, run.run_id).index.last_commit
    if not run.final.is_dir() or not last or (step or last) != last:
        return None
    from safetensors import SafetensorError

    digest = committed_digest(run, last)
    try:
        if digest_of_directory(run.final) != digest:  # of an earlier end: the run was made longer since
            return None
    except (OSError, ValueError, SafetensorError):  # damaged: there may be a checkpoint of that step
        return None
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.copytree(run.final, partial)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{out}: the model could not be copied ({error.strerror or error}): make room or rights there, or give another --out"
        ) from error
    return Exported(out, last, "final", digest)


def _from_checkpoint(run: RunDirectory, config: Config, out: Path, step: int | None) -> Exported:
    from verst.training.export import export_model
    from verst.training.whole import whole_tensors

    config, checkpoint = with_local_model(config), checkpoint_of(run, step)
    tensors = {name: tensor.contiguous() for name, tensor in whole_tensors(checkpoint, config)}
    digest, committed = digest_of(tensors), committed_digest(run, checkpoint.step)
    if digest != committed:
        raise CheckpointError(
            f"{checkpoint.path} has weights with hash {digest}, the journal committed {committed} for step {checkpoint.step}: checkpoint, "
            "model.path or model.dtype is not what it was; nothing was written"
        )
    export_model(config.model.path, tensors, out)
    return Exported(out, checkpoint.step, "checkpoint", digest)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The weights hash, as the trainer publishes it."""
    from verst.weights.files import describe

    return describe(0, iter(tensors.items())).digest


def digest_of_directory(directory: Path) -> str:
    """The weights hash of the safetensors files in a directory."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return digest_of(found)
