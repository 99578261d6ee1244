"""How the ranks are divided among the kinds of parallelism: sizes, divisibility, and the process groups."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

_joined: list[tuple[Any, Layout]] = []
"""The process group and layout for which Megatron's groups, which are global to a process, exist."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel groups. What `world` has beyond tensor × context × pipeline is data parallelism."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks on each pipeline stage
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.context * self.pipeline)

    def __str__(self) -> str:
        sizes = (
            ("TP", self.tensor),
            ("PP", self.pipeline),
            ("VPP", self.virtual),
            ("CP", self.context),
            ("EP", self.expert),
            ("ETP", self.expert_tensor if self.expert_tensor != self.tensor else 1),
            ("DP", self.data),
        )
        return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "one rank"


def fits(args: argparse.Namespace, world: int) -> list[str]:
    """Every divisibility that parsed arguments violate, one line each; Megatron itself stops at the first."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    tensor, pipeline = "tensor_model_parallel_size", "pipeline_model_parallel_size"
    rules: list[tuple[str, int | None, str, int]] = [
        ("train.ranks", world, f"{tensor} × {pipeline} × context_parallel_size", tp * pp * cp),
        ("num_attention_heads of the model", args.num_attention_heads, tensor, tp),
        ("intermediate_size of the model", args.ffn_hidden_size, tensor, tp),
        ("num_hidden_layers of the model", *_stages(args, pp)),
    ]
    if args.group_query_attention:
        rules.append(("num_key_value_heads of the model", args.num_query_groups, tensor, tp))
    if args.sequence_parallel or args.multi_latent_attention:
        rules.append(("hidden_size of the model", args.hidden_size, tensor, tp))
    if args.multi_latent_attention:
        rules.append(("q_lora_rank of the model", args.q_lora_rank, tensor, tp))
        rules.append(("kv_lora_rank + qk_rope_head_dim of the model", args.kv_lora_rank + args.qk_pos_emb_head_dim, tensor, tp))
    if args.num_experts:
        expert, expert_tensor = "expert_model_parallel_size", "expert_tensor_parallel_size"
        rules.append(("the number of experts of the model", args.num_experts, expert, ep))
        rules.append(("moe_intermediate_size of the model", args.moe_ffn_hidden_size, expert_tensor, etp))
        rules.append(("shared experts' width of the model", args.moe_shared_expert_intermediate_size, tensor, tp))
        rules.append(("train.ranks", world, f"{expert} × {expert_tensor} × {pipeline}", ep * etp * pp))
    problems = [
        f"train.megatron: {what} ({value}) is not divisible by {divisor} ({size})"
        for what, value, divisor, size in rules
        if value is not None and (size < 1 or value % size)
    ]
    return problems + _missing(args, tp, ep)


def _stages(args: argparse.Namespace, pp: int) -> tuple[int | None, str, int]:
    """Layers and the number of parts they are cut into; no layers where the run file cuts unevenly, which Megatron checks itself."""
    uneven = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers, args.pipeline_model_parallel_layout)
    if any(option is not None for option in uneven):
        return None, "", 1
    per_stage, stages = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    if per_stage:
        return args.num_layers, "pipeline_model_parallel_size × num_layers_per_virtual_pipeline_stage", pp * per_stage
    if stages:
        return args.num_layers, "pipeline_model_parallel_size × num_virtual_stages_per_pipeline_rank", pp * stages
    return args.num_layers, "pipeline_model_parallel_size", pp


def _missing(args: argparse.Namespace, tp: int, ep: int) -> list[str]:
    problems = []
    if args.sequence_parallel and tp == 1:
        problems.append("train.megatron: sequence_parallel needs tensor_model_parallel_size above 1")
    if args.num_experts and tp > 1 and not args.sequence_parallel:
        problems.append("train.megatron: a mixture of experts with tensor_model_parallel_size above 1 needs sequence_parallel: true")
    if not args.num_experts and ep > 1:
        problems.append("train.megatron: expert_model_parallel_size needs a model with experts")
    return problems


def join(layout: Layout, device: str, timeout_s: float) -> None:
    """Makes Megatron's process groups for this layout; nothing if they exist. A collective. One rank gets a group of its own."""
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():  # Megatron asks for one even where there is nobody to talk to
        transport = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(transport, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    if _joined and _joined[0] == (dist.group.WORLD, layout) and parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=timeout_s / 60,  # pyright: ignore[reportArgumentType] (it becomes a timedelta)
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    _joined[:] = [(dist.group.WORLD, layout)]
