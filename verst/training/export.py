"""The trained model as a Hugging Face directory: the original's files with new weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from verst.errors import CheckpointError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def export_model(source: str | Path, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Writes `tensors` (Hugging Face names) beside copies of every file of `source` that is not weights.

    The directory appears under its name only when complete; one that is there already is replaced.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    partial = directory.with_name(directory.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in Path(source).expanduser().iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copy(file, partial / file.name)
        save_file(dict(tensors), partial / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{directory}: the model could not be exported ({reason}): make room or rights there") from error
