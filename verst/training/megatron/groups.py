"""Megatron's process groups, one function each. Megatron's own types allow for modes in which they are other things."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

_state: Any = parallel_state


def tensor() -> dist.ProcessGroup:
    return _state.get_tensor_model_parallel_group()


def pipeline() -> dist.ProcessGroup:
    return _state.get_pipeline_model_parallel_group()


def context() -> dist.ProcessGroup:
    return _state.get_context_parallel_group()


def data() -> dist.ProcessGroup:
    return _state.get_data_parallel_group()


def expert() -> dist.ProcessGroup:
    return _state.get_expert_model_parallel_group()


def expert_tensor() -> dist.ProcessGroup:
    return _state.get_expert_tensor_parallel_group()


def data_and_context() -> dist.ProcessGroup:
    return _state.get_data_parallel_group(with_context_parallel=True)
