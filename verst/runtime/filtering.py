"""What filters say of finished groups, each asked in a process of its own.

A filter is asked once for a group, as soon as it is finished, beside the rollout of others. What it left out or dropped goes into the
journal with the batch, so whoever trains the step again does not ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from verst.config.schema import FiltersConfig
from verst.errors import CallFailed
from verst.filters.spec import FilterSpec, Verdict
from verst.isolated.call import Called
from verst.types import Group, Status, Trajectory

LOG = "filters.log"


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a group: all of it is dropped for a reason, or a filter failed, or some members are left out (by their index)."""

    left_out: Mapping[int, str] = field(default_factory=dict)
    dropped: str | None = None
    failed: str | None = None


class Filters(Called):
    """Of one run, in the order of the run file: each sees what those before it left. Without any, nothing is started or counted."""

    def __init__(self, config: FiltersConfig, logs: Path, secrets: Sequence[str] = ()) -> None:
        specs = (FilterSpec(name, options) for name, options in config.functions.items())
        super().__init__(specs, deadline_s=config.deadline_s, option="filters.deadline_s", log=logs / LOG, secrets=secrets)
        self._counts: Counter[str] = Counter()

    async def judge(self, group: Group) -> Judged:
        """Asks one filter after the other, until one drops the group. Of a group that cannot be trained none is asked."""
        left_out: dict[int, str] = {}
        for caller in self._callers:
            group = without(group, left_out)
            if not group.trainable:
                break
            try:
                verdict: Verdict = await caller.call(_light(group))
            except CallFailed as failure:
                self._counts["filters/failed"] += 1
                return Judged(failed=str(failure))
            if isinstance(verdict, str):
                self._counts["filters/dropped"] += 1
                return Judged(dropped=f"{caller.title}: {verdict}")
            for member, reason in (verdict or {}).items():
                if group.trajectories[int(member)].status is not Status.FAILED:
                    left_out[int(member)] = f"{caller.title}: {reason}"
        self._counts["filters/left_out"] += len(left_out)
        return Judged(left_out)

    def report(self) -> dict[str, float]:
        """Metrics since the last call: groups dropped, groups dropped because a filter failed, trajectories left out."""
        counts, self._counts = self._counts, Counter()
        names = ("filters/dropped", "filters/failed", "filters/left_out")
        return {name: float(counts[name]) for name in names} if self._callers else {}


def without(group: Group, left_out: Mapping[int, str]) -> Group:
    """The group, where these members have failed with the reason: they are kept, and not trained."""
    if not left_out:
        return group
    trajectories = tuple(t.failed(f"left out by {left_out[m]}") if m in left_out else t for m, t in enumerate(group.trajectories))
    return replace(group, trajectories=trajectories)


def _light(group: Group) -> Group:
    """Without routes, which are many times as large as all else."""
    return replace(group, trajectories=tuple(_without_routes(t) for t in group.trajectories))


def _without_routes(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, routes=None, branches=tuple(replace(branch, routes=None) for branch in trajectory.branches))
