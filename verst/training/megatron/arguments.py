"""Megatron's own arguments: which may be given, which Verst sets, and whether they fit the model and the number of ranks.

Any argument of Megatron's own parser may be given by its name. What Verst decides elsewhere in the run file, or reads from the model's
config.json, is refused by name; arguments of parts of Megatron that Verst does not run (data, logging, checkpoints, inference) are
refused too, because they would have no effect. Nothing is started here: `verst check` calls `check`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from verst.algorithms.table import records_routes
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.model_spec import install
from verst.training.megatron import compat
from verst.training.megatron.layout import Layout, fits
from verst.training.megatron.table.families import family_of
from verst.training.megatron.table.rows import Family

_KEY = "train.megatron"

_FROM_RUN_FILE = {
    "lr": "train.lr",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "clip_grad": "train.clip_norm",
    "micro_batch_size": "train.microbatch_tokens",
    "global_batch_size": "train.groups_per_step",
    "rampup_batch_size": "train.groups_per_step",
    "step_batch_size_schedule": "train.groups_per_step",
    "train_iters": "run.steps",
    "train_samples": "run.steps",
    "seed": "run.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "deterministic_mode": "run.deterministic",
    "recompute_activations": "train.gradient_checkpointing, or recompute_granularity",
    "distributed_timeout_minutes": "train.deadline_s",
}
"""Arguments that have an option of Verst's own."""

_VERST_DECIDES = {
    "optimizer": "the optimizer is AdamW, as in every backend",
    "attention_dropout": "the policy that samples has no dropout, so the trainer has none",
    "hidden_dropout": "the policy that samples has no dropout, so the trainer has none",
    "moe_aux_loss_coeff": "the gradient is that of the policy's loss alone",
    "moe_z_loss_coeff": "the gradient is that of the policy's loss alone",
    "moe_router_load_balancing_type": "the gradient is that of the policy's loss alone",
    "moe_router_bias_update_rate": "the bias of the experts' choice stays as it was loaded",
    "moe_input_jitter_eps": "the policy that samples adds no noise to its routing",
    "mtp_num_layers": "multi-token-prediction layers take no part in the policy",
    "calculate_per_token_loss": "each token carries its own weight in the loss",
    "ddp_average_in_collective": "each token carries its own weight in the loss",
    "use_cpu_initialization": "weights are read from model.path",
    "perform_initialization": "weights are read from model.path",
    "init_method_xavier_uniform": "weights are read from model.path",
    "check_for_nan_in_loss_and_grad": "an update that is not finite is skipped",
    "distributed_backend": "it follows from the device",
    "spec": "layers follow from model.path",
    "yaml_cfg": "the run file is the configuration",
    "use_megatron_fsdp": "train.backend fsdp shards parameters",
    "use_torch_fsdp2": "train.backend fsdp shards parameters",
}

_NOT_RUN = frozenset({
    *("profiling", "rl", "RNG and initialization", "learning rate and weight decay", "checkpointing", "validation", "data and dataloader"),
    *("tokenizer", "autoresume", "biencoder", "vision", "heterogeneous architecture", "logging", "Logits Distillation", "straggler"),
    *("workload inspector", "inference", "one logger", "In-process restart", "ft_package", "rerun engine", "msc", "sft", "fault injector"),
})  # fmt: skip
"""Groups of Megatron's parser that belong to its own training program."""


def check(config: Config, arguments: Mapping[str, Any], world: int) -> argparse.Namespace:
    """What the backend does with its arguments before it starts anything: see `parse`. Reads the model's config.json only."""
    install(config.model.spec)
    path = Path(config.model.path).expanduser()
    hf_config = AutoConfig.from_pretrained(path)
    return parse(config, arguments, hf_config, family_of(hf_config, config.model.path), world)


def parse(config: Config, arguments: Mapping[str, Any], hf_config: Any, family: Family, world: int) -> argparse.Namespace:
    """Megatron's arguments for this run, parsed and validated by Megatron, with those that Verst sets.

    Raises `ConfigError` with one line for everything that is wrong.
    """
    compat.require()
    parser = _parser()
    derived = _model_arguments(family, hf_config) | _run_arguments(config, world)
    problems = family.problems(hf_config) + _refused(parser, arguments, derived) + _conflicts(config, arguments)
    tokens: list[str] = []
    if not problems:
        tokens = _tokens(parser, arguments, problems)
    _raise(problems)
    try:
        args = parser.parse_args(tokens)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{_KEY}: {error}") from error
    defaults = _defaults(config, shares=world > 1 or args.overlap_param_gather)
    vars(args).update({name: value for name, value in defaults.items() if name not in _dests(parser, arguments)} | derived)
    _raise(fits(args, world) + (_not_compiled(args) if config.train.compile else []))
    _validate(args)
    _raise(_not_replayed(args) if records_routes(config) else [])
    return args


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{_KEY}: {message}")


def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False))


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _actions(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Actions by every name they go by: that of the value and those of the switches."""
    named: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        for name in dict.fromkeys([action.dest, *map(_plain, action.option_strings)]):
            named.setdefault(name, []).append(action)
    return named


def _dests(parser: argparse.ArgumentParser, arguments: Mapping[str, Any]) -> set[str]:
    named = _actions(parser)
    return {action.dest for name in arguments for action in named[_plain(name)]}


def _refused(parser: argparse.ArgumentParser, arguments: Mapping[str, Any], derived: Mapping[str, Any]) -> list[str]:
    """Unknown names with the nearest known one, and names that are not for the run file to set."""
    named = _actions(parser)
    group_of = {id(action): group.title for group in parser._action_groups for action in group._group_actions}
    problems = []
    for given in arguments:
        name = _plain(given)
        if name not in named:
            near = difflib.get_close_matches(name, named, n=1)
            problems.append(f"{_KEY}.{given}: Megatron has no such argument" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        action = named[name][0]
        reason = _reason(action.dest, group_of.get(id(action)) or "", derived)
        if reason:
            problems.append(f"{_KEY}.{given}: not to be set here: {reason}")
    return problems


def _reason(dest: str, group: str, derived: Mapping[str, Any]) -> str:
    if dest in _FROM_RUN_FILE:
        return f"Verst takes it from {_FROM_RUN_FILE[dest]}"
    if dest in _VERST_DECIDES:
        return _VERST_DECIDES[dest]
    if dest in derived:
        return "it follows from the model's config.json and the run file"
    return f"it belongs to Megatron's own training program ({group}), which Verst does not run" if group in _NOT_RUN else ""


def _conflicts(config: Config, arguments: Mapping[str, Any]) -> list[str]:
    problems = []
    given = {_plain(name) for name in arguments}
    if config.train.gradient_checkpointing and "recompute_granularity" in given:
        problems.append(f"{_KEY}.recompute_granularity: train.gradient_checkpointing already recomputes whole layers; set one of the two")
    if arguments.get("transformer_impl") == "transformer_engine" and not _has_transformer_engine():
        problems.append(
            f"{_KEY}.transformer_impl: the package transformer_engine is not installed; leave it out to use plain PyTorch layers"
        )
    return problems


def _not_compiled(args: argparse.Namespace) -> list[str]:
    """Why layers of this model and layout cannot be compiled as a whole."""
    reasons = {
        "TransformerEngine's layers are fused already": args.transformer_impl == "transformer_engine",
        "layers with experts wait for the CPU in their middle": bool(args.num_experts),
        "latent attention is not tested with it": args.multi_latent_attention,
        "layers that communicate are not tested with it": args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1,
    }
    return [f"train.compile: {reason}; leave it false with train.backend megatron here" for reason, holds in reasons.items() if holds]


def _not_replayed(args: argparse.Namespace) -> list[str]:
    """Options under which a router would not take, or not keep to, the experts that were recorded."""
    reasons = {
        "moe_router_fusion": ("chooses experts in one kernel that takes no recorded ones", args.moe_router_fusion),
        "moe_expert_capacity_factor": ("drops tokens that were not dropped as they were sampled", args.moe_expert_capacity_factor),
        "cuda_graph_impl": ("replays the experts of the microbatch that was captured", args.cuda_graph_impl != "none"),
    }
    wrong = [(name, reason) for name, (reason, holds) in reasons.items() if args.num_experts and holds]
    return [f"{_KEY}.{name}: it {reason}: remove it, or set train.routes=ignore" for name, reason in wrong]


def _tokens(parser: argparse.ArgumentParser, arguments: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The arguments as a command line, for Megatron's parser to convert and check."""
    named = _actions(parser)
    tokens: list[str] = []
    for given, value in arguments.items():
        actions = named[_plain(given)]
        switches = [action for action in actions if action.nargs == 0]
        if not switches:
            tokens += [actions[0].option_strings[0], *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
        elif not isinstance(value, bool):
            problems.append(f"{_KEY}.{given}: expected true or false, not {value!r}")
        else:
            tokens += _switch(_plain(given), value, switches)
    return tokens


def _switch(name: str, value: bool, switches: list[argparse.Action]) -> list[str]:
    by_value_name = [action for action in switches if action.dest == name]
    if not by_value_name:  # named by the switch itself, as no_rope_fusion: true is to throw it
        return [switches[0].option_strings[0]] if value else []
    matching = [action for action in by_value_name if action.const is value]
    return [matching[0].option_strings[0]] if matching else []


def _model_arguments(family: Family, hf_config: Any) -> dict[str, Any]:
    return family.arguments(hf_config)


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _run_arguments(config: Config, world: int) -> dict[str, Any]:
    train = config.train
    half = config.model.dtype == "bfloat16"
    return {
        "world_size": world,
        "rank": 0,
        "seq_length": train.microbatch_tokens,
        "max_position_embeddings": train.microbatch_tokens,  # of a row that packs sequences; those keep to the limits of data and rollout
        "micro_batch_size": 1,
        "global_batch_size": None,
        "train_iters": config.run.steps * train.minibatches * train.epochs,
        "lr": train.lr,
        "min_lr": 0.0,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_eps": 1e-8,
        "clip_grad": train.clip_norm,
        "optimizer": "adam",
        "bf16": half,
        "fp16": False,
        "accumulate_allreduce_grads_in_fp32": True,
        "grad_reduce_in_bf16": False,
        "seed": config.run.seed + 1,  # Megatron wants a positive one; nothing draws from it
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        "calculate_per_token_loss": True,
        "ddp_average_in_collective": False,
        "check_for_nan_in_loss_and_grad": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "distributed_backend": "nccl" if torch.cuda.is_available() else "gloo",
        "distributed_timeout_minutes": train.deadline_s / 60,
        "tokenizer_type": "NullTokenizer",
        "eval_iters": 0,
        "deterministic_mode": False,
    }


def _defaults(config: Config, *, shares: bool) -> dict[str, Any]:
    """What holds unless the run file says otherwise. `shares`: the optimizer's state is to be shared among ranks."""
    engine = _has_transformer_engine()
    defaults: dict[str, Any] = {
        "transformer_impl": "transformer_engine" if engine else "local",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "use_distributed_optimizer": shares,  # a rank alone has nothing to share, and it copies tensor by tensor
    }
    if not engine:  # kernels that only TransformerEngine or Apex have
        defaults |= {
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
            "moe_grouped_gemm": False,
            "moe_permute_fusion": False,
        }
    if not torch.cuda.is_available():
        defaults |= {"bias_swiglu_fusion": False, "bias_dropout_fusion": False}
    if config.train.gradient_checkpointing:
        defaults |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return defaults


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own cross-field checks, which print, assert, raise or exit."""
    from megatron.training.arguments import validate_args

    args._is_global_batch_size_explicitly_specified = False
    said = io.StringIO()
    try:
        with compat.quiet(), contextlib.redirect_stdout(said):
            validate_args(args)
    except SystemExit as error:
        raise ConfigError(f"{_KEY}: Megatron refuses these arguments: {said.getvalue().strip()}") from error
    except (AssertionError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(f"{_KEY}: Megatron refuses these arguments: {error or type(error).__name__}") from error
    args.variable_seq_lengths = args.pipeline_model_parallel_size > 1  # stages tell each other the length of each packed microbatch


def layout_of(args: argparse.Namespace) -> Layout:
    """The sizes of the parallel groups in validated arguments."""
    return Layout(
        world=args.world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
    )
