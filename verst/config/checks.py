"""Rules between options: which contradict each other, and which have no effect in a given run.

Each message begins with the dotted name of the option, so that `verst.config.load` can add its line in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from verst.config import scheduled
from verst.config.algorithms import (
    ClippedConfig,
    ComparingConfig,
    CorrectionConfig,
    DistillConfig,
    DpoConfig,
    GroupRelativeConfig,
    OfflineConfig,
    PolicyGradientConfig,
    PpoConfig,
    PreferenceConfig,
    RatioConfig,
    SftConfig,
)
from verst.config.evaluated import best_metrics, evaluated

if TYPE_CHECKING:
    from verst.config.algorithms import AlgorithmConfig
    from verst.config.schema import Config

PAIR = frozenset({"chosen", "rejected"})
"""Names in `data.columns` of the two answers of a pair."""
_SAMPLING = ("rollout.group_size", "rollout.oversample", "rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.min_p")
_FIDELITY = ("fidelity.limit", "fidelity.action")
_FILTERS = ("top_p", "top_k", "min_p")
_SWITCHES = {
    "eval.": "eval.every_steps",
    "algorithm.kl_": "algorithm.kl_coefficient",
    "tracking.prometheus_": "tracking.prometheus_port",
    "tracking.project": "tracking.trackers",
    "tracking.samples_": "tracking.trackers",
}
_ROLLED_AND_SCORED = (
    *("rollout.environment", "rollout.environment_options", "rollout.max_turns", "rollout.stop"),
    *("reward.function", "reward.options", "reward.workers", "reward.deadline_s", "reward.actor_gpus"),
)


def inapplicable(config: Config) -> dict[str, str]:
    """The options that this run never reads, by dotted name, each with the reason."""
    reasons: dict[str, str] = {}
    if not config.eval.every_steps:
        reasons |= _each(("eval.prompts", "eval.temperature"), "the held-out share is not evaluated without eval.every_steps")
    if config.data.task is None and config.data.dataset is None:
        reasons["data.options"] = "these are the options of data.task and data.dataset, neither of which is set"
    if config.capacity_groups == config.train.groups_per_step:
        alone = "with rollout.capacity_groups of one batch "
        reasons["rollout.window_groups"] = alone + "every step takes all groups"
        reasons["weights.in_flight"] = alone + "nothing is in flight when a version arrives"
    if config.rollout.engine != "sglang":
        reasons |= _each(("rollout.sglang", "rollout.urls"), f"the engine is {config.rollout.engine}, not sglang")
    if config.train.backend != "megatron":
        reasons["train.megatron"] = f"the backend is {config.train.backend}, not megatron"
    reasons |= _untracked(config)
    algorithm = config.algorithm
    if isinstance(algorithm, OfflineConfig):
        reasons |= _each((*_SAMPLING, *_FIDELITY), "sft and dpo learn from answers that the data has, and sample nothing to train on")
        reasons["tracking.samples_every_steps"] = "sft and dpo sample nothing"
        if not evaluated(config):
            why = "sft and dpo generate and score only for evaluation, and there are neither eval.every_steps nor eval.sets"
            reasons |= _each(_ROLLED_AND_SCORED, why)
    if isinstance(algorithm, DistillConfig) and not is_given(config, "reward.function"):
        reasons["reward.function"] = "distill learns from its teacher, and scores what it trains only by a reward that is named"
    return reasons | _unread_by_gradients(algorithm)


def _unread_by_gradients(algorithm: AlgorithmConfig) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if isinstance(algorithm, PolicyGradientConfig) and not algorithm.kl_coefficient:
        reasons |= _each(("algorithm.kl_in", "algorithm.kl_estimator"), "algorithm.kl_coefficient is 0, so there is no KL term")
    if isinstance(algorithm, ClippedConfig) and algorithm.loss is not None:
        reasons |= _each(("algorithm.clip_low", "algorithm.clip_high"), "algorithm.loss, your own, has whatever bounds it has")
    if isinstance(algorithm, GroupRelativeConfig) and algorithm.advantages is not None:
        reasons["algorithm.normalize_std"] = "algorithm.advantages, your own, divides by whatever it does"
    return reasons


def _untracked(config: Config) -> dict[str, str]:
    tracking, reasons = config.tracking, {}
    if not tracking.trackers:
        reasons["tracking.samples_every_steps"] = "tracking.trackers names none"
    if set(tracking.trackers) <= {"tensorboard"}:
        reasons["tracking.project"] = "tracking.trackers names none that has projects"
    if tracking.prometheus_port == 0:
        reasons["tracking.prometheus_host"] = "tracking.prometheus_port is 0, so nothing is served"
    return reasons


def problems(config: Config) -> list[str]:
    """Everything that is wrong between valid options."""
    reasons = inapplicable(config)
    unread = [
        f"{key} does not apply: {why}. Remove it, or set {key}=null on the command line"
        for key, why in reasons.items()
        if is_given(config, key) and not _switched_off(config, key)
    ]
    return [
        *unread,
        *_data_problems(config),
        *_evaluation_problems(config),
        *_group_problems(config),
        *_correction_problems(config),
        *_critic_problems(config),
        *_size_problems(config),
        *_engine_problems(config),
        *scheduled.problems(config, reasons),
        *_teacher_problems(config),
    ]


def warnings(config: Config) -> list[str]:
    """What a run may do, but its owner should know."""
    found = []
    if isinstance(config.algorithm, PolicyGradientConfig):
        defaults = type(config.rollout).model_fields
        filters = [f"rollout.{name}" for name in _FILTERS if getattr(config.rollout, name) != defaults[name].default]
        if filters:
            found.append(
                f"{' and '.join(filters)}: log-probabilities recorded in sampling are of the filtered distribution, the trainer's of "
                "the whole vocabulary. The difference counts as mismatch, and off-policy ratios include it"
            )
    if config.train.warmup_steps >= config.run.steps:
        found.append(f"train.warmup_steps ({config.train.warmup_steps}) is not below run.steps ({config.run.steps}): all steps are warm-up")
    return found


def _switched_off(config: Config, key: str) -> bool:
    """Whether the part that reads the option was switched off by name (`eval.every_steps=0`): its other options may stay in the file."""
    return any(key.startswith(part) and is_given(config, switch) for part, switch in _SWITCHES.items())


def scores(config: Config, *, reward_given: bool) -> bool:
    """Whether the trajectories to train on are scored. `reward_given`: from Python."""
    if isinstance(config.algorithm, OfflineConfig):
        return False
    return not isinstance(config.algorithm, DistillConfig) or reward_given or is_given(config, "reward.function")


def is_given(config: Config, key: str) -> bool:
    """Whether the option was set, by file, override or mapping, rather than left at its default. `null` is not setting it."""
    section, name = key.split(".")
    part = getattr(config, section)
    return name in part.model_fields_set and getattr(part, name) is not None


def _each(keys: Iterable[str], reason: str) -> dict[str, str]:
    return dict.fromkeys(keys, reason)


def _engine_problems(config: Config) -> list[str]:
    urls, replicas = config.rollout.urls, config.rollout.replicas
    if config.rollout.engine == "sglang" and urls and len(urls) != replicas:
        return [f"rollout.urls names {len(urls)} servers for {replicas} replicas: each replica is one server"]
    return []


def _teacher_problems(config: Config) -> list[str]:
    if not isinstance(config.algorithm, DistillConfig):
        return []
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return [
        f"rollout.{name} is {getattr(config.rollout, name):g}, but distill compares with the teacher's distribution over the whole "
        f"vocabulary at temperature 1: remove it, or set {value:g}"
        for name, value in whole.items()
        if getattr(config.rollout, name) != value
    ]


def _data_problems(config: Config) -> list[str]:
    found = []
    data, columns = config.data, config.data.columns
    sources = [f"data.{name}" for name in ("path", "dataset", "task") if getattr(data, name)]
    if len(sources) > 1:
        found.append(f"{' and '.join(sources)} are set: keep one")
    if "messages" in columns and columns.keys() & {"prompt", "demonstration"}:
        found.append("data.columns has messages, whole conversations, so it takes neither prompt nor demonstration: keep one way")
    if "demonstration" in columns and not isinstance(config.algorithm, SftConfig):
        found.append(f"data.columns has a demonstration, but {config.algorithm.name} imitates nothing: give the column a field's name")
    curriculum = data.curriculum
    if curriculum is not None and curriculum.end <= curriculum.start:
        found.append(
            f"data.curriculum goes from {curriculum.start:g} to {curriculum.end:g}: a larger number is a harder prompt, so end must be "
            "above start. Where it is the other way round, give the rows a field with the sign changed"
        )
    return found + _pair_problems(config)


def _pair_problems(config: Config) -> list[str]:
    pair = config.data.columns.keys() & PAIR
    if not pair:
        return []  # told with the data, as of a demonstration that is missing
    names = " and ".join(sorted(pair))
    if not isinstance(config.algorithm, DpoConfig):
        return [f"data.columns has {names}, but {config.algorithm.name} compares no pairs: give the columns fields' names"]
    if pair != PAIR:
        return [f"data.columns has {names} only: a pair is chosen and rejected"]
    if config.data.columns.keys() & {"messages", "demonstration"}:
        return ["data.columns has a pair of answers, so it takes neither messages nor demonstration: keep one way"]
    return []


def _evaluation_problems(config: Config) -> list[str]:
    found = []
    if config.eval.every_steps and not config.data.holdout:
        found.append("eval.every_steps needs data.holdout > 0: the prompts kept for evaluation")
    for name, chosen in config.eval.sets.items():
        key = f"eval.sets.{name}"
        sources = [source for source in ("path", "dataset", "task") if getattr(chosen, source)]
        if len(sources) != 1:
            found.append(f"{key} has {' and '.join(sources) or 'no source of prompts'}: set exactly one of path, dataset and task")
        if chosen.options and sources == ["path"]:
            found.append(f"{key}.options does not apply: these are the options of task and dataset, and the set has a path. Remove it")
        if chosen.samples > 1 and chosen.temperature == 0:
            found.append(
                f"{key}.samples is {chosen.samples}, but temperature 0 is greedy: they would all be the same. Set {key}.temperature, or 1 "
                "sample"
            )
    best, known = config.checkpoint.best, best_metrics(config)
    if best is not None and best not in known:
        there = f"there are: {', '.join(known)}" if known else "it evaluates nothing: set eval.every_steps and data.holdout, or eval.sets"
        found.append(f"checkpoint.best is {best:.60}, which this run never measures of the weights that a checkpoint has; {there}")
    return found


def _group_problems(config: Config) -> list[str]:
    rollout, algorithm, found = config.rollout, config.algorithm, []
    if isinstance(algorithm, PreferenceConfig) and not isinstance(algorithm, OfflineConfig) and rollout.group_size < 2:
        found.append(f"rollout.group_size is 1, but {algorithm.name} compares two answers of each group. Use 2 or more")
    if isinstance(algorithm, ComparingConfig) and rollout.group_size < 2:
        found.append(
            f"rollout.group_size is 1, but {algorithm.name}'s baseline is the mean of the group: every advantage would be 0. Use 2 or more"
        )
    if not isinstance(algorithm, OfflineConfig):
        same = "so the trajectories of a group would all be the same"
        if rollout.temperature == 0:
            found.append(f"rollout.temperature is 0 (greedy), {same}. Use 1.0; evaluation has its own eval.temperature")
        if rollout.top_k == 1:
            found.append(f"rollout.top_k is 1 (greedy), {same}. Use 0, which is off")
        if rollout.oversample and config.run.deterministic:
            found.append(
                "rollout.oversample: which trajectories end first, and so which are cut, depends on the machine's pace, and "
                "run.deterministic promises the same bits again. Set run.deterministic=false"
            )
    if config.capacity_groups < config.train.groups_per_step:
        found.append(
            f"rollout.capacity_groups ({rollout.capacity_groups}) is below train.groups_per_step ({config.train.groups_per_step}): "
            "a batch could never be filled"
        )
    if config.worst_staleness and isinstance(algorithm, RatioConfig):
        found += _off_policy_problems(config, algorithm)
    return found


def _off_policy_problems(config: Config, algorithm: RatioConfig) -> list[str]:
    """The ratio to log-probabilities that the trainer computes anew says nothing of the weights that the tokens were sampled by."""
    if algorithm.old_logprobs == "behaviour" or algorithm.corrections:
        return []
    return [
        f"rollout.capacity_groups ({config.capacity_groups}) lets tokens be {config.worst_staleness} versions old, but the loss would take "
        "all for the newest version's: set algorithm.old_logprobs=behaviour, or algorithm.corrections (docs/fidelity.md)"
    ]


def _critic_problems(config: Config) -> list[str]:
    algorithm, found = config.algorithm, []
    if not isinstance(algorithm, PpoConfig):
        return found
    if algorithm.critic_warmup_steps >= config.run.steps:
        found.append(
            f"algorithm.critic_warmup_steps ({algorithm.critic_warmup_steps}) is not below run.steps ({config.run.steps}): the policy "
            "would never be trained"
        )
    return found


def _correction_problems(config: Config) -> list[str]:
    if not isinstance(config.algorithm, RatioConfig) or not config.algorithm.corrections:
        return []
    found = []
    if config.algorithm.old_logprobs == "behaviour":
        found.append(
            "algorithm.corrections and algorithm.old_logprobs=behaviour: the clipped ratio is then live over behaviour probability, which "
            "holds trainer over behaviour already, so it would count twice. Use old_logprobs=trainer, or no corrections"
        )
    weighing = [c.kind for c in config.algorithm.corrections if c.kind != "reject"]
    if len(weighing) > 1:
        found.append(
            f"algorithm.corrections has {' and '.join(weighing)}, each of which weighs by the ratio: it would count {len(weighing)} times. "
            "Keep one of them, and use reject for further bounds"
        )
    for number, correction in enumerate(config.algorithm.corrections, start=1):
        problem = _bounds_problem(correction)
        if problem:
            found.append(f"algorithm.corrections number {number} ({correction.kind}, {correction.level}): {problem}")
    return found


def _bounds_problem(correction: CorrectionConfig) -> str | None:
    lower, upper = correction.lower, correction.upper
    agreed = "tokens on which engine and trainer agree have the ratio 1"
    if upper is not None and upper < 1:
        return f"upper is {upper:g}, but {agreed} and would be cut. Use 1 or more"
    if lower > 1:
        return f"lower is {lower:g}, but {agreed} and would be cut. Use 1 or less"
    if correction.kind == "truncate" and lower > 0:
        return "truncate has no lower bound: a small ratio is a small weight. Remove lower, or use mask"
    if correction.kind != "reject" and upper is None:
        return "upper is required: without it one token could outweigh the rest of the batch"
    if correction.kind == "reject" and upper is None and not lower:
        return "reject needs lower, upper or both: without them it rejects nothing"
    return None


def _size_problems(config: Config) -> list[str]:
    train, found = config.train, []
    if (
        isinstance(config.algorithm, PreferenceConfig)
        and config.max_trajectory_tokens <= train.microbatch_tokens < 2 * config.max_trajectory_tokens
    ):
        found.append(
            f"train.microbatch_tokens ({train.microbatch_tokens}) is below two of the longest trajectories (2 x "
            f"{config.max_trajectory_tokens}): {config.algorithm.name} needs both answers of a pair in one forward pass"
        )
    if train.microbatch_tokens < config.max_trajectory_tokens:
        found.append(
            f"train.microbatch_tokens ({train.microbatch_tokens}) is below the longest trajectory ({config.max_trajectory_tokens} = "
            "data.max_prompt_tokens + rollout.max_turns x rollout.max_new_tokens): one that long could not be trained"
        )
    if train.minibatches > train.groups_per_step:
        found.append(f"train.minibatches ({train.minibatches}) is above train.groups_per_step ({train.groups_per_step})")
    return found
