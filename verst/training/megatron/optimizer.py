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

    def __init__(self, args: argparse.Namespace, chunks: Sequence[Any], train: TrainConfig, updates_per_step: int, steps: int) -> None:
        super().__init__(train, updates_per_step, steps)
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
                # One of its own each: Megatron's loading has all parameters share one, and each step then counts as many.
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

    def sharded(self, model: dict[str, Any], options: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Masters and moments as Megatron's distributed checkpoints describe them, beside the model's own description."""
        return self._whole.sharded_state_dict(model, is_loading=loading, metadata=options)

    def load_sharded(self, state: dict[str, Any]) -> None:
        """Takes `sharded` up after Megatron has filled it in; `restored` must follow."""
        for part in self._parts:
            if isinstance(part, DistributedOptimizer):
                untyped: Any = part
                take = untyped._set_main_param_and_optimizer_states
                # It looks for a step of each parameter, which its own checkpoints do not have.
                untyped._set_main_param_and_optimizer_states = lambda p, tensors, take=take: take(p, {"step": None, **tensors})
        self._whole.load_state_dict(state)

    def _measure(self, broken: float) -> tuple[float, float]:
        with compat.quiet():
            self._whole.prepare_grads()
            norm = float(self._whole.get_grad_norm() or 0.0)
        (broken,) = sum_over_ranks([broken])
        return norm, broken

    def _apply(self, rate: float, norm: float) -> None:
        for group in self._groups():
            group["lr"] = rate
        for part in self._parts:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self._train.clip_norm, total_norm=norm)
        with compat.quiet():
            self._whole.step_with_ready_grads()
