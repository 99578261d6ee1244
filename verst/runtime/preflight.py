"""Finds what is wrong with a run before any process is started for it."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import Any

from verst import extend, hooks, model_spec
from verst.algorithms.own import check_function
from verst.algorithms.table import algorithm_for, records_routes
from verst.config.algorithms import DistillConfig, PpoConfig
from verst.config.checks import is_given, warnings
from verst.config.evaluated import evaluated
from verst.config.hub import with_local_model
from verst.config.plan import language_part, read_config, read_model
from verst.config.schema import Config
from verst.data.sources import Source, open_source
from verst.data.stream import PromptStream
from verst.errors import ConfigError, ExtensionError, ModelError
from verst.filters.shipped import SHIPPED as FILTERS
from verst.filters.spec import FilterSpec, check_filter_call
from verst.on_paper import stand_in
from verst.protocols import Advantages, Environment, Loss, ModelSpec, Reward, Rollout, SampleFilter, TrainingHook
from verst.rewards import adapters
from verst.rewards.spec import RewardSpec
from verst.rewards.table import SHIPPED as REWARDS
from verst.rollout import environments
from verst.rollout.environments import environment_factory
from verst.routing.kinds import routed_experts, unread_experts
from verst.runtime.eval_sets import EvalSets
from verst.runtime.extensions import Extensions
from verst.runtime.outlets import check_trackers
from verst.types import Prompt

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Findings:
    """What is worth knowing of a run that can start."""

    warnings: tuple[str, ...]
    stream: Mapping[str, Any]
    """State of the prompt stream before its first prompt: what a resumed run compares its data with."""


def preflight(config: Config, extensions: Extensions) -> Findings:
    """Reads the model's headers and the prompts needed to know that there are enough. Loads no weights and imports no module that a run
    file names, nor torch, unless Megatron-Core has to check its arguments.

    Raises:
        VerstError: what is missing, malformed or does not fit.
    """
    _check_model(config)
    _check_critic(config)
    _check_teacher(config)
    check_stack(config)
    check_trackers(config.tracking)
    _check_algorithm(config.algorithm)
    if algorithm_for(config.algorithm).learns_from == "policy" or evaluated(config):
        _check_reward(config, extensions.reward)
        _check_environment(config, extensions.environment)
    elif extensions.reward is not None or extensions.environment is not None:
        raise ConfigError(
            f"a reward or environment is given, but {config.algorithm.name} without eval.every_steps or eval.sets uses neither: "
            "leave it out"
        )
    for name, options in config.filters.functions.items():
        if name in FILTERS:
            FilterSpec(name, options).build()
        else:
            _check_own(name, "filter", SampleFilter, partial(check_filter_call, options=options), shipped=FILTERS)
    for name, options in config.hooks.classes.items():
        _check_own(name, "hook", TrainingHook, partial(hooks.check_on_paper, title=f"hook {name}", options=options))
    return Findings(tuple(warnings(config)), _check_data(config, extensions))


def _check_model(config: Config) -> None:
    if config.model.spec is not None:
        _check_own(config.model.spec, "model spec", ModelSpec, model_spec.check_on_paper)
    limit = read_model(config.model.path).max_positions
    if limit is not None and config.max_trajectory_tokens > limit:
        raise ModelError(
            f"a trajectory may have {config.max_trajectory_tokens} tokens (data.max_prompt_tokens + rollout.max_turns x "
            f"rollout.max_new_tokens), but {config.model.path} is made for {limit} (max_position_embeddings): lower one of the three"
        )
    if config.model.spec is not None:
        return  # it says how the model routes
    key = unread_experts(read_config(config.model.path)) if records_routes(config) else None
    if key is not None:
        raise ConfigError(
            f"train.routes: {config.model.path} has experts ({key} in its config.json), but it is not known how that family says which "
            "layers route and how many experts a token gets, so routes could not be replayed: set train.routes=ignore"
        )


def _check_critic(config: Config) -> None:
    """Whether the directory that the critic begins from is there, and its model reads the policy's tokens."""
    path = config.algorithm.critic_path if isinstance(config.algorithm, PpoConfig) else None
    if path is None:
        return
    root = Path(path).expanduser()
    if not (root / "config.json").is_file() or not list(root.glob("*.safetensors")):
        raise ModelError(f"algorithm.critic_path: {root} has no config.json and *.safetensors; give a Hugging Face model directory")
    own, policy = (language_part(read_config(directory)).get("vocab_size", 0) for directory in (root, config.model.path))
    if own < policy:
        raise ModelError(
            f"algorithm.critic_path: {root} knows {own} tokens, {config.model.path} {policy}: the critic reads the policy's tokens, so "
            "give a model of the same tokenizer"
        )


def _check_teacher(config: Config) -> None:
    if not isinstance(config.algorithm, DistillConfig):
        return
    path = config.algorithm.teacher
    try:
        limit = read_model(path).max_positions
    except ModelError as error:
        raise ModelError(f"algorithm.teacher: {str(error).removeprefix('model.path: ')}") from error
    if limit is not None and config.max_trajectory_tokens > limit:
        raise ModelError(
            f"algorithm.teacher: a trajectory may have {config.max_trajectory_tokens} tokens, but {path} is made for {limit} "
            "(max_position_embeddings): lower data.max_prompt_tokens or rollout.max_new_tokens, or take another teacher"
        )


def check_stack(config: Config) -> None:
    """The arguments of SGLang and Megatron-Core, by their own parsers; says how to install what is missing."""
    if config.rollout.engine == "sglang":
        from verst.rollout.sglang import arguments as sglang

        routes = records_routes(config) and routed_experts(read_config(config.model.path)) is not None
        sglang.check(config.rollout.sglang, device="cuda" if _NVIDIA_DRIVER.exists() else "cpu", record_routes=routes)
    if config.train.backend == "megatron":
        from verst.training.megatron import arguments as megatron  # with torch

        megatron.check(with_local_model(config), config.train.megatron, config.train.ranks)


def _check_data(config: Config, extensions: Extensions) -> Mapping[str, Any]:
    """The first prompt, and those for evaluation. Returns the stream's state before the first."""
    source = open_source(config.data, extensions.rows)
    _check_order(config, source)
    stream = PromptStream(source, config.data, seed=config.run.seed, split="train")
    start = stream.state()
    prompt = stream.next()
    _require_answers(config, prompt)
    EvalSets.of(config, source)
    return start


def _require_answers(config: Config, prompt: Prompt) -> None:
    """Raises `ConfigError` if the algorithm learns from answers that the data does not have."""
    algorithm = algorithm_for(config.algorithm)
    if algorithm.learns_from != "demonstrations":
        return
    if algorithm.whole_groups and not prompt.rejected:
        raise ConfigError(
            f"algorithm {algorithm.name} learns from pairs of answers, but {prompt.id} has none: name the columns, "
            "data.columns={chosen: COLUMN, rejected: COLUMN}"
        )
    if not prompt.demonstration:
        raise ConfigError(
            f"algorithm {algorithm.name} learns from demonstrations, but {prompt.id} has none: "
            "name the column with the answers, data.columns={demonstration: COLUMN}"
        )


def _check_order(config: Config, source: Source) -> None:
    if config.data.curriculum is not None and not source.rereadable:
        raise ConfigError(
            "data.curriculum passes over rows until they are easy enough, and a one-shot iterator gives them once. Give a list"
        )
    if source.num_blocks is None and config.data.shuffle and is_given(config, "data.shuffle"):
        raise ConfigError(
            "data.shuffle does not apply: an iterator is read one row after another, in its own order. Give a list, or remove the option"
        )


def _check_reward(config: Config, given: Any) -> None:
    options = config.reward.options
    if given is not None:
        is_class = inspect.isclass(given)
        extend.check_callable(given, "reward", () if is_class else ("trajectory", "fields"), options)
    elif config.reward.function in REWARDS:
        RewardSpec.of(config.reward).build()
    elif (adapted := adapters.parts(config.reward.function)) is not None:
        adapters.check_options(adapted[0], options)
        for reference in adapted[1]:
            _check_reference(reference, {}, "reward")
            adapters.check_on_paper(adapted[0], reference)
    else:
        check = partial(extend.made, kind="reward", parameters=("trajectory", "fields"), options=options)
        _check_own(config.reward.function, "reward", Reward, check, shipped=REWARDS)


def _check_algorithm(options: Any) -> None:
    for kind, protocol in (("advantages", Advantages), ("loss", Loss)):
        reference = getattr(options, kind, None)
        if reference is not None:
            _check_own(reference, kind, protocol, partial(check_function, kind=kind))


def _check_environment(config: Config, given: Any) -> None:
    rollout, options = config.rollout, config.rollout.environment_options
    if given is not None:
        environment_factory(given, options)
        return
    if (asking := environments.of_prefix(rollout.environment)) is not None:
        kind, reference = asking
        _check_own(reference, kind, Rollout, lambda found: environments.BY_PREFIX[kind](found, **options))
        return
    if rollout.environment.startswith(environments.VERIFIERS):
        reference = rollout.environment.removeprefix(environments.VERIFIERS)
        if ":" in reference:
            _check_own(reference, "environment", Rollout, lambda found: extend.check_callable(found, "environment", (), options))
        environment_factory(rollout.environment, options)
        return
    if rollout.environment not in environments.SHIPPED:
        check = partial(environment_factory, options=options)
        _check_own(rollout.environment, "environment", Environment, check, shipped=environments.SHIPPED)
        return
    factory: Any = environment_factory(rollout.environment, options)  # a class, as those that are shipped
    try:
        turns = getattr(factory(), "turns", rollout.max_turns)
    except (TypeError, ValueError) as error:
        raise ExtensionError(f"environment {rollout.environment!r} does not take rollout.environment_options: {error}") from error
    if rollout.environment == "single_turn" and rollout.max_turns > 1:
        raise ConfigError(
            f"rollout.max_turns is {rollout.max_turns}, but the environment single_turn ends after one: remove it, or name another"
        )
    if rollout.max_turns < turns:
        raise ConfigError(
            f"rollout.max_turns is {rollout.max_turns}, so {rollout.environment} could not have its {turns} turns: raise it to {turns}"
        )


def _check_own(
    reference: str, kind: str, protocol: type, check: Callable[[Any], object], shipped: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Finds what a run file names, and does with its stand-in what the run does with it as it starts."""
    _check_reference(reference, shipped, kind)
    found = stand_in(reference, kind, protocol)
    if found is not None:
        check(found)


def _check_reference(reference: str, shipped: Mapping[str, Any], kind: str) -> None:
    """`module:name` is well formed and its outermost package can be found. Nothing is imported."""
    module = extend.split_reference(reference, shipped=shipped, kind=kind)[0]
    package = module.partition(".")[0]
    if PathFinder.find_spec(package, [os.getcwd()]) is None and not _installed(package):
        raise extend.no_module(f"{kind} {reference!r}", package)


def _installed(package: str) -> bool:
    try:
        return package != "__main__" and importlib.util.find_spec(package) is not None  # __main__ is another module in every process
    except ValueError:  # a module made by hand, which no other process could find
        return False
