"""The whole model from the shards of a Megatron checkpoint, of any layout, without process groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from verst.errors import CheckpointError
from verst.training.megatron import compat
from verst.training.megatron.files import WeightFiles
from verst.training.megatron.table.families import family_of
from verst.training.megatron.table.rows import unshard
from verst.training.model import named


def whole_tensors(files: Sequence[Path], model_path: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors in the model's type; the bias of expert choice, which is not trained, in float32 as it was.

    Raises `ConfigError` if Megatron-Core is not installed, `CheckpointError` if the shards are not those of this model.
    """
    compat.require()
    from verst.training.megatron.reshard import SavedShards
    from verst.training.megatron.tensors import entries_of, is_buffer

    path = Path(model_path).expanduser()
    hf_config = AutoConfig.from_pretrained(path)
    family = family_of(hf_config, model_path)
    groups = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    originals = WeightFiles(model_path)
    entries = list(entries_of(family, hf_config, originals))
    with SavedShards(files) as shards:
        foreign = sorted({key[0] for key in shards.keys - {entry.key for entry in entries}})
        if foreign:
            raise CheckpointError(f"{files[0].parent} is of another model than {model_path}, which has no {named(foreign)}")
        for entry in entries:
            if is_buffer(entry.row):
                yield from ((name, originals.read(name).float()) for name in entry.names)
                continue
            whole = unshard(entry.row, shards.parts("model", entry.key), entry.shapes, groups)
            yield from zip(entry.names, (tensor.to(dtype) for tensor in whole), strict=True)
