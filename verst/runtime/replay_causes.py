"""Why a replay may have come to other weights than the run: what is recorded of the run, compared with what is here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from verst.runtime.changes import unrecorded
from verst.runtime.replay_plan import Plan
from verst.runtime.replayed import ReplayedStep
from verst.runtime.stored import newest_state


def likely_causes(plan: Plan, first: ReplayedStep) -> list[str]:
    """What differs from the run, and then what cannot be known. `first` is the first step that came out otherwise."""
    found = [*_options(plan), *_packages(plan), *_place(first)]
    if not plan.config.run.deterministic:
        found.insert(0, "run.deterministic is false: kernels of a GPU may add numbers in another order each time")
    unknown = "the kind of processor or GPU" + (", and the files of the model" if not plan.restored else "")
    return [*found, f"not recorded, so not compared: {unknown}"]


def _options(plan: Plan) -> list[str]:
    """Those of config.yaml against the newest checkpoint, which has what the run had when it was made."""
    checkpoint, _ = newest_state(plan.run)
    if checkpoint is None or not checkpoint.step:
        return []
    options = unrecorded(plan.run, checkpoint.loop["config"], plan.config)
    return [f"{key} is {now} in config.yaml, and was {then} at step {checkpoint.step}" for key, (then, now) in options.items()]


def _packages(plan: Plan) -> list[str]:
    """Those that compute."""
    return [
        f"{name} {then} then, {now} now"
        for name, then in plan.run.packages.items()
        if name in ("torch", "transformers") and (now := _version(name)) != then
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _place(first: ReplayedStep) -> list[str]:
    """Where in the step it shows first."""
    loss, norm = (_same(first, metric) for metric in ("loss/total", "update/grad_norm"))
    if loss is None:
        return []
    if not loss:
        return [f"the loss of step {first.step} is not the recorded one: its groups, the weights before it or its forward pass are others"]
    if norm is False:
        return [f"the loss of step {first.step} is the recorded one, its gradient norm is not: its rewards or its backward pass are others"]
    return [f"loss and gradient norm of step {first.step} are the recorded ones: its update is another"]


def _same(first: ReplayedStep, metric: str) -> bool | None:
    if metric not in first.metrics or metric not in first.recorded:
        return None
    return first.metrics[metric] == first.recorded[metric]
