"""Checkpoints that another layout can load: Megatron's distributed checkpointing of weights, masters and moments.

`state()` of the backend is bit for bit but fits its own layout only; this is the way from one layout to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from verst.errors import CheckpointError
from verst.training.megatron import compat, groups
from verst.training.megatron.optimizer import MegatronAdamW


def save(directory: Path, chunks: Sequence[Any], optimizer: MegatronAdamW) -> None:
    """Writes this rank's shards into `directory`, which must be empty or absent and on a disk that all ranks share. A collective."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    try:
        with compat.quiet():
            dist_checkpointing.save(_state(chunks, optimizer, loading=False) | {"counters": optimizer.counters()}, str(directory))
    except (OSError, CheckpointingException) as error:
        raise CheckpointError(f"checkpoint {directory} could not be written: {error}") from error


def load(directory: Path, chunks: Sequence[Any], optimizer: MegatronAdamW) -> None:
    """Takes up what any layout of the same model has saved. A collective. Raises `CheckpointError` if it cannot be read or does not fit."""
    try:
        with compat.quiet():
            state: Any = dist_checkpointing.load(_state(chunks, optimizer, loading=True), str(directory))
    except (OSError, CheckpointingException, KeyError) as error:
        raise CheckpointError(f"checkpoint {directory} does not fit this model: {error}") from error
    with compat.quiet():
        for i, chunk in enumerate(chunks):
            chunk.module.load_state_dict(state[f"model{i}"])
        optimizer.load_sharded(state["optimizer"])
        optimizer.restored(state["counters"])


def _state(chunks: Sequence[Any], optimizer: MegatronAdamW, *, loading: bool) -> dict[str, Any]:
    options = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.data_and_context(),
    }
    state: dict[str, Any] = {f"model{i}": chunk.module.sharded_state_dict(metadata=options) for i, chunk in enumerate(chunks)}
    return state | {"optimizer": optimizer.sharded(state, options, loading=loading)}
