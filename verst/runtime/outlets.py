"""Where a run's reports go, by its configuration, and what of its groups is shown there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import verst
from verst.config.schema import Config, TrackingConfig
from verst.errors import ConfigError
from verst.observe.trackers import PACKAGES, TRACKERS, Report, RunInfo, Shown
from verst.observe.tracking import Tracking
from verst.runtime.rundir import RunDirectory
from verst.types import Group, Message

if TYPE_CHECKING:
    from verst.observe.prometheus import Endpoint

_SHOWN = 8
"""Trajectories in a table of samples."""
_LONGEST = 4000
"""Characters of a text in it."""
_PRIVATE = ("options", "environment_options", "urls", "sglang")
"""Options that may hold a user's keys: no tracker gets them."""


def check_trackers(tracking: TrackingConfig) -> None:
    """Raises `ConfigError` if a tracker's package is not installed."""
    missing = [name for name in tracking.trackers if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        extras = ",".join(name for name in missing if name != "tensorboard")
        how = f"pip install 'verst[{extras}]'" if extras else "pip install tensorboardX"
        raise ConfigError(f"tracking.trackers names {', '.join(missing)}, not installed here: {how}, or leave it out")


class Outlets:
    """Everything that gets a run's rows beside its own file: trackers, and the metrics for Prometheus. Nothing here waits or raises."""

    def __init__(self, tracking: Tracking, endpoint: Endpoint | None = None, *, samples_every: int = 0) -> None:
        self._tracking = tracking
        self._endpoint = endpoint
        self._samples_every = samples_every

    @classmethod
    def open(cls, run: RunDirectory, config: Config, *, reported: int, tell: Callable[[str], None]) -> Outlets:
        """As configured; each tracker is opened by a thread of its own. `reported`: the last step that they have; -1: none yet.

        An address that Prometheus cannot have is told, and the run goes on without.
        """
        tracking = config.tracking
        info = RunInfo(config.run.name, run.run_id, tracking.project, run.root, public_options(config))
        trackers = Tracking({name: partial(TRACKERS[name], info) for name in tracking.trackers}, after=reported)
        return cls(trackers, _open_endpoint(config, tell), samples_every=tracking.samples_every_steps)

    def counts(self) -> dict[str, float]:
        """What belongs into a row about the outlets themselves: reports that trackers did not take, if there are trackers."""
        return {"tracking/lost": float(self._tracking.lost)} if self._tracking else {}

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation that belongs to no step's row."""
        self._tracking.report(Report(step, metrics))
        if self._endpoint is not None:
            self._endpoint.report(metrics)

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], failed: int) -> None:
        """A committed step. One that was trained again after a restart is not news to trackers."""
        if self._tracking.takes(step):
            shows = self._samples_every > 0 and (step == 1 or step % self._samples_every == 0)
            self._tracking.report(Report(step, metrics, samples_of(step, groups) if shows else ()))
        if self._endpoint is not None:
            self._endpoint.report(metrics, steps=1, dropped=metrics.get("groups/dropped", 0.0), failed=failed)

    def told(self) -> list[str]:
        """Warnings since the last call."""
        return self._tracking.told()

    def close(self) -> None:
        """Waits for trackers that still have something to send, for as long as `verst.observe.tracking` allows."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._tracking.close()


def _open_endpoint(config: Config, tell: Callable[[str], None]) -> Endpoint | None:
    host, port = config.tracking.prometheus_host, config.tracking.prometheus_port
    if port == 0:
        return None
    from verst.observe.prometheus import Endpoint

    try:
        endpoint = Endpoint(host, 0 if port == "auto" else port, run=config.run.name, version=verst.__version__)
    except OSError as error:
        tell(
            f"warning: no metrics for Prometheus: {host}:{port} cannot be listened at ({error.strerror}); the run goes on without. "
            "Set tracking.prometheus_port=auto, or another port and host"
        )
        return None
    tell(f"metrics for Prometheus at {endpoint.url}")
    return endpoint


def public_options(config: Config) -> dict[str, Any]:
    """Every option by its dotted name, without those that may hold keys."""
    sections = config.model_dump(mode="json")
    return {f"{s}.{name}": _public(value) for s, options in sections.items() for name, value in options.items() if name not in _PRIVATE}


def _public(value: Any) -> Any:
    """A set of `eval.sets` has options of its own."""
    return {name: _public(inner) for name, inner in value.items() if name not in _PRIVATE} if isinstance(value, Mapping) else value


def samples_of(step: int, groups: Sequence[Group]) -> list[Shown]:
    """A few trajectories of a step: the first of each group, then the second, and so on."""
    members = [(place, group, trajectory) for group in groups for place, trajectory in enumerate(group.trajectories)]
    members.sort(key=lambda member: member[0])
    return [Shown(step, _text(group.prompt.messages), t.completion[:_LONGEST], t.reward, str(t.status)) for _, group, t in members[:_SHOWN]]


def _text(messages: Sequence[Message]) -> str:
    """The last message as it is; what comes before it with who said it."""
    *before, last = messages
    return "\n".join([*(f"[{m.role}] {m.content}" for m in before), last.content])[-_LONGEST:]
