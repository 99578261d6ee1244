"""The whole model from a checkpoint's files, whatever backend and layout wrote them: what the trainer published at that step, bit for bit.

Reads float32 masters tensor by tensor, joins the shards, and rounds them to the model's type as the trainer did. Moments are left alone.
No process group is needed, nor a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from verst.config.schema import Config
from verst.errors import CheckpointError
from verst.model_spec import install, published_name
from verst.training.checkpoints import Checkpoint
from verst.training.model import load_model, named


def whole_tensors(checkpoint: Checkpoint, config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors on the CPU, as `TrainBackend.weights` yields them; `config` is that of the run.

    What is not trained (frozen parts, buffers) comes from `model.path`.

    Raises:
        CheckpointError: the files do not hold the tensors of that model.
        ModelError: `model.path` is gone or is no model.
    """
    install(config.model.spec)
    files = sorted(checkpoint.path.glob("rank-*.safetensors"))
    dtype = getattr(torch, config.model.dtype)
    if config.train.backend == "fsdp":
        return _of_fsdp(files, config.model.path, dtype)
    from verst.training.megatron.whole import whole_tensors as of_megatron

    return of_megatron(files, config.model.path, dtype)


def _of_fsdp(files: Sequence[Path], model_path: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    model = load_model(model_path, dtype)
    masters = _Masters(files)
    parameters = dict(model.named_parameters())
    foreign = sorted(masters.names - parameters.keys())
    if foreign:
        raise CheckpointError(
            f"{files[0].parent} is of another model than {model_path}, which has no {named(foreign)}: put back the model the run began with"
        )
    for name, parameter in parameters.items():
        tensor = masters.read(name).to(dtype) if name in masters.names else parameter.detach()
        yield published_name(model, name), tensor
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            yield published_name(model, name), buffer.detach()


class _Masters:
    """The float32 parameters in the files of all ranks."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._where = files[0].parent
        self._files = [safe_open(str(path), framework="pt") for path in files]
        metadata = self._files[0].metadata()
        self._full_shapes = {name: tuple(shape) for name, shape in json.loads(metadata["full_shapes"]).items()}
        self.names = {key.removeprefix("model/") for file in self._files for key in file.keys() if key.startswith("model/")}  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        """One parameter, joined along dim 0. Raises `CheckpointError` if its shards do not make it up."""
        key = f"model/{name}"
        parts = [file.get_tensor(key) for file in self._files if key in file.keys()]  # noqa: SIM118
        full_shape = self._full_shapes[key]
        joined = parts[0] if tuple(parts[0].shape) == full_shape else torch.cat(parts)
        if tuple(joined.shape) != full_shape:
            raise CheckpointError(f"{self._where} is not whole: the shards of {name} make up {tuple(joined.shape)}, not {full_shape}")
        return joined
