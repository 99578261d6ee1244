"""Megatron's configuration objects, its data-parallel wrapper and its pipeline schedules, from validated arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.training import get_megatron_ddp_config

from verst.training.megatron import compat
from verst.training.megatron.packed import Packed


def transformer_config(args: argparse.Namespace) -> Any:
    """A new configuration of the model; Megatron's modules write to theirs."""
    return core_transformer_config_from_args(args)


def wrap(chunks: Sequence[Any], config: Any, args: argparse.Namespace) -> list[Any]:
    """The chunks in Megatron's data parallelism, and what its schedules need to know of it."""
    options = get_megatron_ddp_config(args)
    wrapped = [DistributedDataParallel(config, options, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]

    def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **others: Any) -> None:
        finalize_model_grads(model, None, **others)  # each token is weighed already: nothing is divided by their number

    config.finalize_model_grads_func = finalize
    if options.overlap_grad_reduce:
        config.no_sync_func = [w.no_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
        if options.align_param_gather:
            config.param_sync_func = [w.start_param_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].start_param_sync
    return wrapped


def schedule(
    chunks: Sequence[Any],
    microbatches: Sequence[Packed],
    forward: Callable[[Any, Packed], torch.Tensor],
    take: Callable[[Packed, torch.Tensor], torch.Tensor],
    *,
    score_only: bool,
    around: Callable[[Any, Packed], AbstractContextManager[None]] | None,
) -> None:
    """Runs Megatron's schedule for this layout. `take` gets what `forward` of the last stage gave, and returns the microbatch's loss.

    `around`, if any, is entered around each chunk's forward pass of each microbatch.
    """

    def forward_step(microbatch: Iterator[Packed], model: Any) -> tuple[torch.Tensor, Any]:
        packed = next(microbatch)

        def loss(output: torch.Tensor, non_loss_data: bool = False) -> Any:
            value = take(packed, output)
            return value if non_loss_data else (value, torch.tensor(0, dtype=torch.int), {})

        with around(model, packed) if around else nullcontext():
            return forward(model, packed), loss

    several = len(chunks) > 1
    with compat.quiet():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks] if several else iter(microbatches),
            model=list(chunks) if several else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=1,  # stages tell each other the shape of every microbatch
            micro_batch_size=1,
            forward_only=score_only,
            collect_non_loss_data=score_only,
        )
