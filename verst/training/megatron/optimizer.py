"""Megatron's optimizer under Verst's schedule and skip decision."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from verst.config.schema import TrainConfig
from verst.training.distributed import sum_over_ranks
from verst.training.megatron import compat
from verst.training.optimizer import ScheduledOptimizer


class MegatronAdamW(ScheduledOptimizer):
    """AdamW as Megatron runs it: plain, or distributed over data-parallel ranks. `chunks` are wrapped in Megatron's data parallelism."""

    def __init__(
        self, args: argparse.Namespace, chunks: Sequence[Any], train: TrainConfig, updates_per_step: int, steps: int, **names: str
    ) -> None:
        """`names`: see `ScheduledOptimizer`."""
        super().__init__(train, updates_per_step, steps, **names)
        options = {f.name: getattr(args, f.name) for f in dataclasses.fields(OptimizerConfig) if hasattr(args, f.name)}
        self._chunks = chunks
        self._whole: Any = get_megatron_optimizer(OptimizerConfig(**options), list(chunks), use_gloo_process_groups=False)
        self._parts: list[Any] = [
            p for p in getattr(self._whole, "chained_optimizers", [self._whole]) if not getattr(p, "is_stub_optimizer", False)
        ]
        self._steps_by_parameter = all(
            isinstance(part.optimizer, torch.optim.AdamW) for part in self._parts
        )  # TransformerEngine's: by group
        for _, part, parameter in self.masters():
            part.optimizer.state[parameter] |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            if self._steps_by_parameter:
                part.optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        for group in self._groups():
            # Megatron's own scheduler, which Verst's replaces, would set this before the first step.
            group["weight_decay"] = train.weight_decay * group["wd_mult"]
            if self._steps_by_parameter and any(parameter.is_cuda for parameter in group["params"]):
                group["fused"] = True

    def masters(self) -> Iterator[tuple[str, Any, torch.Tensor]]:
        """A name, the optimizer and the float32 tensor of everything this rank updates, in an order that the layout alone decides."""
        for p, part in enumerate(self._parts):
            for g, group in enumerate(part.optimizer.param_groups):
                for i, parameter in enumerate(group["params"]):
                    yield f"{p}.{g}.{i}", part, parameter

    def parameters(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """For each name of `masters` the model's parameter, and the place in it, flattened, where the master's elements begin."""
        for p, part in enumerate(self._parts):
            if isinstance(part, DistributedOptimizer):
                untyped: Any = part
                for parameter, (g, i) in untyped.model_param_group_index_map.items():
                    yield f"{p}.{g}.{i}", parameter, untyped._get_model_param_range_map(parameter)["param"].start
                continue
            halves = zip(getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True)
            rounded = {id(master): parameter for models, masters in halves for parameter, master in zip(models, masters, strict=True)}
            for g, group in enumerate(part.optimizer.param_groups):
                for i, master in enumerate(group["params"]):
                    yield f"{p}.{g}.{i}", rounded.get(id(master), master), 0

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, part, master in self.masters():
            moments = part.optimizer.state[master]
            found |= {f"model/{name}": master, f"exp_avg/{name}": moments["exp_avg"], f"exp_avg_sq/{name}": moments["exp_avg_sq"]}
        return found

    def gradient_buffers(self) -> list[torch.Tensor]:
        buffers = [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return [tensor for buffer in buffers for tensor in (buffer.grad_data, *buffer.extra_main_grads)]

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for part in self._parts for group in part.optimizer.param_groups)

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        with compat.quiet():  # in float32 the masters are slices of the parameters, of whose gradients torch warns
            self._whole.zero_grad()

    def restored(self, counters: Mapping[str, Any]) -> None:
        """Takes up the counters of a state whose masters and moments were copied in, and gives the model its parameters. A collective."""
        self._restore_counters(counters)
        if self._steps_by_parameter:
            for _, part, parameter in self.masters():
                # One of its own each: parameters that shared one would each count the step.
                part.optimizer.state[parameter]["step"] = torch.full((), float(self.stepped), device=parameter.device)
        else:
            for group in self._groups():
                group["step"] = self.stepped
        self.zero_grad()
        self.give_model_its_parameters()

    @torch.no_grad()
    def give_model_its_parameters(self) -> None:
        """Rounds the masters into the model and gathers what other data-parallel ranks hold. A collective."""
        for part in self._parts:
            if hasattr(part, "_copy_main_params_to_model_params"):
                part._copy_main_params_to_model_params()
        with compat.quiet():
            for chunk in self._chunks:
                if chunk.ddp_config.use_distributed_optimizer:
                    chunk.start_param_sync(force_sync=True)

    def _measure(self, broken: float) -> tuple[float, float]:
        with compat.quiet():
            self._whole.prepare_grads()
            norm = float(self._whole.get_grad_norm() or 0.0)
        (broken,) = sum_over_ranks([broken])
        return norm, broken

    def _named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank's buffers hold: of a distributed optimizer also what other ranks step, not yet or not wholly summed."""
        for chunk in self._chunks:
            for name, parameter in chunk.module.named_parameters():
                if getattr(parameter, "main_grad", None) is not None:
                    yield name, parameter.main_grad

    def _apply(self, rate: float, norm: float) -> None:
        for group in self._groups():
            group["lr"] = rate
        for part in self._parts:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self._train.clip_norm, total_norm=norm)
        with compat.quiet():
            self._whole.step_with_ready_grads()
