"""What may change between two starts of one run: where and how fast it computes, for how long, and what changes at steps to come; never
what it has learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verst.config.load import load_config
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.journal.lock import RunLock
from verst.journal.log import Journal, JournalReader
from verst.journal.records import ConfigRecord
from verst.runtime.rundir import RunDirectory
from verst.runtime.stored import checkpoint_steps

CHANGEABLE = frozenset(
    {
        *("run.changes", "run.steps", "run.secrets", "eval.every_steps", "checkpoint.every_steps", "checkpoint.journal_limit_bytes"),
        *("train.ranks", "train.threads", "rollout.replicas"),
        *("fidelity.limit", "fidelity.action"),
        *("filters.deadline_s", "hooks.classes", "hooks.deadline_s", "hooks.required"),
        *("tracking.trackers", "tracking.project", "tracking.samples_every_steps", "tracking.prometheus_port", "tracking.prometheus_host"),
        *("rollout.deadline_s", "reward.deadline_s", "train.deadline_s", "weights.deadline_s"),
    }
)
"""Options that may be changed, beside Megatron's layout; `run.steps` only while the learning rate does not depend on it, and `run.changes`
only for steps that are still to be made."""
_MEGATRON = "train.megatron."
_LAYOUT = frozenset(
    f"{_MEGATRON}{name}"
    for name in (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
        *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
    )
)
"""Megatron's arguments that only say which rank holds what."""
_REASONS = {
    "run": "its name, place and random numbers are those of what it has done already",
    "model": "its checkpoints are of that model",
    "data": "its journal holds the groups that came from that data",
    "rollout": "what is sampled would be another distribution",
    "reward": "rewards in the journal would mean something else",
    "filters": "the rest of the run would be trained on other groups",
    "algorithm": "the rest of the run would learn by another rule",
    "train": "the rest of the run would learn by another rule",
    "weights": "it is settled when the run begins",
    "checkpoint": "it is settled when the run begins",
    "eval": "its evaluations could not be compared any more",
}


def change(run: RunDirectory, config: Config, overrides: Sequence[str], echo: Callable[[str], None]) -> Config:
    """Applies overrides such as `train.ranks=2` to a run that is not alive, and records them. Returns the new configuration.

    Raises:
        ConfigError: names every option that must stay as it is, with the reason, or what is wrong with the new values.
        RunLocked: the run is alive.
    """
    with RunLock(run.root):
        new = load_config(run.config, overrides)
        changed = differences(config.model_dump(mode="json"), new.model_dump(mode="json"))
        reasons = {key: reason for key in changed if (reason := _reason(key, config))}
        if "run.changes" in changed and (made := _made(*changed["run.changes"], run)) is not None:
            reasons["run.changes"] = made
        if reasons:
            refused = [f"{key} cannot be changed in a run: {reason}" for key, reason in reasons.items()]
            allowed = ", ".join(sorted(CHANGEABLE - reasons.keys()))
            raise ConfigError("\n".join([*refused, f"what can be: {allowed} and Megatron's parallel sizes; for others start a new run"]))
        if changed:
            from verst.runtime.preflight import check_stack

            check_stack(new)
            committed = JournalReader(run.journal, run.run_id).index.last_commit
            if new.run.steps < committed:
                raise ConfigError(
                    f"run.steps {new.run.steps}: {run.root} has committed {committed} steps already: give {committed} or more"
                )
            run.change(new, changed, step=committed, checkpoint=max(checkpoint_steps(run), default=0))
    for key, (before, after) in changed.items():
        echo(f"{key}: {before} -> {after}")
    return new


def unrecorded(run: RunDirectory, before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Options that decide what a step comes out as, and that are others now than in `before`, an earlier resolved configuration of the run,
    though `change` has not changed them.
    """
    known = {key for change in run.changes for key in change["options"]}
    found = differences(before, config.model_dump(mode="json"))
    return {key: values for key, values in found.items() if key not in known and _decides(key, config)}


def _decides(key: str, config: Config) -> bool:
    """Whether a step that was made comes out otherwise with another value."""
    return key == "run.changes" or _reorders_sums(key) or _reason(key, config) is not None


def journal_changes(run: RunDirectory, journal: Journal) -> None:
    """Writes to the journal the changes that it has not: those made since it was last open, or that a loss of power took from it."""
    for change in run.changes[len(journal.index.configured) :]:
        journal.append_configured(ConfigRecord(change["step"], change["options"]))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that differ between two resolved configurations, by dotted name (Megatron's arguments one by one), with both values."""
    old, new = _flat(before), _flat(after)
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def reordered_since(run: RunDirectory, step: int) -> set[str]:
    """Options that were changed after steps beyond `step` had been committed, and that decide which numbers are added first.

    With them the steps after `step` come out with other bits when they are trained again.
    """
    return {key for change in run.changes if change["step"] > step for key in change["options"] if _reorders_sums(key)}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that a run trained on the same ranks and threads, in the same layout.

    It went on from the state of step `begun`, as the stretch before had left it. The steps from there to `committed` had been committed by
    that one, and were trained again: up to rounding the same, and what the later steps are built on.
    """

    config: Config
    begun: int = 0
    committed: int = 0


def stretches(run: RunDirectory, config: Config) -> list[Stretch]:
    """The stretches of a run whose configuration is `config` now, in order: for each committed step, how the run has computed it."""
    found = [Stretch(config)]
    for change in reversed(run.changes):
        options = {key: before for key, (before, _) in change["options"].items() if _reorders_sums(key)}
        if options:
            begun = change.get("checkpoint", change["step"])  # those of earlier versions do not say it
            later = replace(found[0], begun=begun, committed=change["step"])
            found[:1] = [Stretch(_with(later.config, options)), later]
    return found


def _with(config: Config, options: Mapping[str, Any]) -> Config:
    """The configuration with other ranks, threads and layout. None takes one of Megatron's arguments out."""
    own = {key.removeprefix("train."): value for key, value in options.items() if not key.startswith(_MEGATRON)}
    megatron = {argument.replace("-", "_"): value for argument, value in config.train.megatron.items()}
    megatron |= {key.removeprefix(_MEGATRON): value for key, value in options.items() if key.startswith(_MEGATRON)}
    given = {argument: value for argument, value in megatron.items() if value is not None}
    return config.model_copy(update={"train": config.train.model_copy(update={**own, "megatron": given})})


def _reorders_sums(key: str) -> bool:
    return key in ("train.ranks", "train.threads") or key.startswith(_MEGATRON)


def _made(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], run: RunDirectory) -> str | None:
    """Why what changes at steps cannot be said anew; None if it can."""
    first = min(change["step"] for change in (*before, *after) if change not in before or change not in after)
    begun = JournalReader(run.journal, run.run_id).index.last_batch
    return None if first > begun else f"step {first} has been made, or its batch is in the journal: give a step after {begun}"


def _reason(key: str, config: Config) -> str | None:
    """Why an option must stay as it is; None if it need not."""
    if key == "run.steps" and config.train.schedule != "constant":
        return f"train.schedule {config.train.schedule} reaches 0 at run.steps, so every learning rate would be another"
    if key in CHANGEABLE or key in _LAYOUT:
        return None
    if key.startswith(_MEGATRON):
        return "it may change what is computed, and does not only say which rank holds what"
    return _REASONS[key.split(".")[0]]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, options in config.items():
        for name, value in options.items():
            if f"{section}.{name}" == "train.megatron":
                flat |= {f"train.megatron.{argument.replace('-', '_')}": given for argument, given in value.items()}
            else:
                flat[f"{section}.{name}"] = value
    return flat
