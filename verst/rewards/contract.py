"""The contract of a reward, to be run on one's own in one call; `verst.testing` has it under the same name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from verst.config.schema import RewardConfig
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.types import FinishReason, Group, Message, Status, Trajectory


async def check_reward(
    found: Any, groups: Sequence[Group], *, repeats: bool = True, deadline_s: float = 30.0, **options: Any
) -> list[list[float]]:
    """The contract of a reward, run on yours in a process of its own, as in a run. Returns the rewards of each group.

    It can be sent to that process; it gives each trajectory a finite number in time, also one that says nothing and one that was cut; and
    the same number once more, in another order.

    Args:
        found: the function or class, or a reference as in `reward.function`, such as `trl:module:function`.
        groups: finished groups, as `verst.testing.make_group` makes them.
        repeats: False: the same trajectory may be given another number, as a judge does.
        deadline_s: limit of scoring one trajectory.
        options: as in `reward.options`.

    Raises `ExtensionError` if it cannot be loaded, or with the expected signature if its own does not fit, and `AssertionError` with the
    reason for all else.
    """
    assert groups, "expected at least one group to score"
    assert all(group.trainable for group in groups), "expected trajectories in each group that have not failed"
    with _by_value(found):
        spec = RewardSpec(found, options) if isinstance(found, str) else RewardSpec.of(RewardConfig(options=options), found)
    scorer = Scorer(spec, workers=1, deadline_s=deadline_s)
    try:
        await scorer.start()
        rewards = [_rewards(await scorer.score(group)) for group in groups]
        for group, first in reversed(list(zip(groups, rewards, strict=True))):
            turned = replace(group, trajectories=group.trajectories[::-1])
            again = _rewards(await scorer.score(turned))[::-1]
            assert again == first or not repeats, f"expected the rewards of group {group.seq} to be the same again: {first} and {again}"
            one = group.trainable[0]
            edges = (_silent(one), replace(one, id=f"{group.seq}/{len(group.trajectories)}", status=Status.TRUNCATED))
            _rewards(await scorer.score(replace(group, trajectories=edges)))
    finally:
        scorer.close()
    return rewards


def _rewards(group: Group) -> list[float]:
    """Of the trajectories that were to be scored."""
    found: list[float] = []
    for trajectory in group.trajectories:
        assert trajectory.reward is not None, f"expected a number for {trajectory.completion[:60]!r}: {trajectory.error}"
        found.append(trajectory.reward)
    return found


def _silent(trajectory: Trajectory) -> Trajectory:
    """The same, had its policy ended its last turn at once."""
    last = trajectory.turns[-1]
    turns = (*trajectory.turns[:-1], replace(last, text="", finish=FinishReason.STOP))
    return replace(trajectory, turns=turns, messages=(*trajectory.messages[:-1], Message("assistant", "")))


@contextmanager
def _by_value(found: Any) -> Iterator[None]:
    """What a test defines travels with it: the process need not find the test's module."""
    import cloudpickle

    module = sys.modules.get(getattr(found, "__module__", None) or "")
    if module is None or isinstance(found, str) or module.__name__.partition(".")[0] in ("verst", "__main__"):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
