"""What a batch takes of the finished groups, and what is dropped: groups that failed, that filters refuse, or that have no gradient."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.algorithms.table import algorithm_for
from verst.config.scheduled import changed_at, config_at
from verst.config.schema import Config
from verst.errors import DataError
from verst.runtime import batching
from verst.runtime.filtering import Judged, without
from verst.runtime.parts import Parts
from verst.runtime.slots import Ready
from verst.runtime.standing import Standing
from verst.runtime.wait import within
from verst.types import Group

_REPLACED_BATCHES = 20
"""Batches' worth of groups without signal, or refused by filters, that end a run before one whole batch was found."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Groups that were dropped since the batch before, each with the reason."""

    groups: Sequence[Group]
    reasons: dict[int, str]
    left_out: Mapping[int, Mapping[int, str]]
    """Members of the batch's groups that filters left out, by the group's `seq`."""
    metrics: Mapping[str, float]
    changed: Mapping[str, Any]
    """Options that have another value from this step on, with the values before and after."""

    @property
    def plan(self) -> dict[str, Any]:
        """For the batch's record: what it takes to make the same batch of the journal's groups."""
        found = {"left_out": self.left_out, "changed": self.changed}
        return {name: values for name, values in found.items() if values}


GiveUp = Callable[[int], Awaitable[None]]


class Intake:
    """Of one loop. `give_up` frees what a dropped group holds; `known` are groups that an earlier run had finished."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        ready: Ready,
        standing: Standing,
        give_up: Callable[[int], Awaitable[None]],
        known: frozenset[int],
    ) -> None:
        self._config, self._parts, self._ready, self._standing = config, parts, ready, standing
        self._give_up, self._known = give_up, known
        self._algorithm = algorithm_for(config.algorithm)
        self._dropped: dict[int, tuple[Group, str]] = {}  # since the last batch, each with the reason
        self._drops_in_a_row = 0
        self._signalless = 0  # groups dropped for their rewards, or by filters, since the last batch
        self._judged: dict[int, Judged] = {}  # groups that wait for their turn
        self._left_out: dict[int, Mapping[int, str]] = {}  # members of the groups that were taken since the last batch

    async def judge(self, group: Group) -> None:
        """Asks the filters about a finished group, beside all others; its turn is later."""
        self._judged[group.seq] = await self._parts.filters.judge(group)

    async def take(self, count: int, step: int) -> list[Group]:
        """The next `count` trainable groups, for a step. Raises `DataError` after too many others, `DeadlineExceeded` if none comes."""
        groups: list[Group] = []
        while len(groups) < count:
            limit = self._parts.group_deadline_s
            group = await within(self._ready.pop(), limit, f"the next of {count} groups ({len(groups)} are ready)")
            group = batching.refused(group, self._parts.trainers.routed_experts)
            judged = self._judged.pop(group.seq)
            if (reason := batching.unusable(group, self._algorithm.min_members) or judged.failed) is not None:
                await self._drop(group, reason)
            elif (reason := self._refused(group, judged, step)) is not None:
                await self._replace(group, reason, step)
            else:
                groups.append(self._taken(group, judged))
        return groups

    def _refused(self, group: Group, judged: Judged, step: int) -> str | None:
        """Why a group that can be trained is not, or None."""
        left = without(group, judged.left_out)
        unusable = batching.unusable(left, self._algorithm.min_members)
        return judged.dropped or unusable or batching.without_signal(left, config_at(self._config, step).algorithm)

    def _taken(self, group: Group, judged: Judged) -> Group:
        """The group as the batch trains it."""
        self._standing.group(group.seq, "the rest of its batch")
        self._drops_in_a_row = 0
        if judged.left_out:
            self._left_out[group.seq] = judged.left_out
        return without(group, judged.left_out)

    def dropped(self, step: int) -> Dropped:
        """What was dropped since the last call, which goes on record with the batch of a step, as do options that change with it."""
        changed = changed_at(self._config, step)
        for key, (before, after) in changed.items():
            self._parts.observer.note(f"from step {step}: {key} {before} -> {after}")
        groups, reasons = [group for group, _ in self._dropped.values()], {seq: reason for seq, (_, reason) in self._dropped.items()}
        replaced = float(self._signalless)
        metrics = {"groups/dropped": len(groups) - replaced, "groups/replaced": replaced, **self._parts.filters.report()}
        found = Dropped(groups, reasons, self._left_out, metrics, changed)
        self._dropped, self._left_out, self._signalless = {}, {}, 0
        return found

    async def _replace(self, group: Group, reason: str, step: int) -> None:
        """Drops a group that has no gradient, or that a filter refuses: no failure, but it must not go on for ever."""
        self._signalless += 1
        if self._signalless > _REPLACED_BATCHES * self._config.train.groups_per_step:
            raise DataError(
                f"step {step}: {self._signalless} groups were dropped because they had nothing to teach (the last: {reason}) before a "
                "batch was whole: the task is too easy or too hard for the model, or a filter too strict. Change the data, or what "
                f"drops them (docs/algorithms.md, docs/extending.md), then go on with: verst resume {self._parts.run.root}"
            )
        await self._drop_for(group, reason)

    async def _drop(self, group: Group, reason: str) -> None:
        """Gives up a group that cannot be trained, and tells of it. Too many in a row end the run."""
        if group.seq not in self._known:  # else it failed before the restart, and what made it fail may be mended
            self._drops_in_a_row += 1
        self._parts.observer.note(f"group {group.seq} ({group.prompt.id}) dropped: {reason}")
        if self._drops_in_a_row > 2 * self._config.capacity_groups:
            raise DataError(
                f"{self._drops_in_a_row} groups in a row could not be trained; the last one (group {group.seq}, prompt {group.prompt.id}): "
                f"{reason}. Mend what made them fail, then go on with: verst resume {self._parts.run.root}"
            )
        await self._drop_for(group, reason)

    async def _drop_for(self, group: Group, reason: str) -> None:
        self._dropped[group.seq] = (group, reason)
        await self._give_up(group.seq)
