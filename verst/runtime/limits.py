"""How long a step, a group and a version may take, from the limits that a run file sets for their parts.

Each is longer than the sum of those inside it, so that the innermost expires first and names what was really awaited.

What waits its turn is counted in trajectories: a training group has `rolled_per_group` of them, an evaluated prompt as many as are sampled.
"""

from __future__ import annotations

from verst.config.algorithms import DistillConfig
from verst.config.evaluated import HELD_OUT, evaluated
from verst.config.schema import Config
from verst.isolated.process import START_DEADLINE_S
from verst.rollout.user_loop import HOLD_S

REPLACEMENTS = 3
"""Attempts at what was lost in the same place, with no progress between them."""

_CLOSE_S = 90.0
"""Longer than an environment may take to close (`verst.rollout.boundary`), which it does after the limit of its group.

It may have to wait until the users' loop is taken from another that blocks it (`verst.rollout.user_loop`).
"""


def turn_limit_s(config: Config) -> float:
    """Limit of a step up to its checkpoint, hand-overs of shared devices included. Every call in it has a limit of its own."""
    return (8 + 2 * config.train.minibatches * config.train.epochs) * config.train.deadline_s


def evaluated_trajectories(config: Config, samples: int = 1) -> int:
    """In flight at a time, beside training groups, when all sets are due at once. `samples`: of each prompt of the held-out share."""
    return sum(one.prompts * one.samples * (samples if one.name == HELD_OUT else 1) for one in evaluated(config))


def held_trajectories(config: Config, *, replicas: int, samples: int = 1) -> int:
    """The most that one of so many replicas has in flight. `samples`: of each evaluated prompt."""
    return -(-config.capacity_groups // replicas) * config.rolled_per_group + evaluated_trajectories(config, samples)


def rolling_deadline_s(config: Config, trajectories: int, samples: int = 1) -> float:
    """Limit of a trajectory among so many on one replica, once it has begun and as long as the engine is not paused for a version.

    Those that wait for a place in the engine get the time of those before. A later turn waits behind all that came meanwhile too, which
    may be as many as the replica can have (`samples`: of each evaluated prompt).
    """
    before = trajectories
    if config.rollout.max_turns > 1:
        before = max(before, held_trajectories(config, replicas=config.rollout.replicas, samples=samples))
    return config.rollout.deadline_s * (1 + before // config.rollout.max_running)


def hold_s(config: Config) -> float:
    """For how long code of one trajectory may hold the event loop that it shares: others then have most of their time left."""
    return min(HOLD_S, config.rollout.deadline_s / 4)


def teacher_deadline_s(config: Config) -> float:
    """Limit of what a teacher says of a group, behind all others that its replica may have; 0 without a teacher."""
    if not isinstance(config.algorithm, DistillConfig):
        return 0.0
    return rolling_deadline_s(config, held_trajectories(config, replicas=1))


def group_deadline_s(config: Config, trajectories: int, *, shared: bool) -> float:
    """Limit of a group among so many trajectories on one replica, from there and back: versions that come, rolling, teacher, scoring.

    `shared`: the trainer uses the device in between, once for each step that rollout may be ahead.
    """
    before = max(trajectories, held_trajectories(config, replicas=config.rollout.replicas))  # later ones may be scored first
    scoring_s = before * 2 * (config.reward.deadline_s + START_DEADLINE_S)  # by one worker, replaced after each, which is tried twice
    if config.weights.in_flight == "finish" and not shared:
        versions_s = drain_limit_s(config) + _pull_s(config)  # it begins after the one that it finds under way
    else:
        versions_s = config.worst_staleness * (_pull_s(config) + (turn_limit_s(config) if shared else 0.0))
    return versions_s + rolling_deadline_s(config, before) + _CLOSE_S + teacher_deadline_s(config) + scoring_s


def step_wait_s(config: Config, *, shared: bool) -> float:
    """Limit of the wait for the next group, which may be rolled twice, with all others and an evaluation on its replica."""
    most = held_trajectories(config, replicas=1)
    rolled_s = 2 * group_deadline_s(config, most, shared=shared) + config.weights.deadline_s + 10.0
    return rolled_s + _filtering_s(config) + replacement_limit_s(config)


def _filtering_s(config: Config) -> float:
    """Every group may wait for all others at each filter, which may be started again after each."""
    return config.capacity_groups * len(config.filters.functions) * (config.filters.deadline_s + START_DEADLINE_S)


def drain_limit_s(config: Config) -> float:
    """Limit of finishing what is in flight before a version; 0 if it need not finish. One replica has all, if the others have left."""
    if config.weights.in_flight != "finish":
        return 0.0
    return rolling_deadline_s(config, held_trajectories(config, replicas=1)) + _CLOSE_S


def recovery_limit_s(config: Config) -> float:
    """Limit of bringing lost trainer ranks back, tried as often as it is, with the steps that are trained again."""
    return 10 * turn_limit_s(config)


def replacement_limit_s(config: Config) -> float:
    """Limit of a lost replica's replacement: its start, tried as often as it is, and the version that it begins with."""
    return REPLACEMENTS * (config.train.deadline_s + pull_limit_s(config)) + turn_limit_s(config)


def pull_limit_s(config: Config) -> float:
    """Limit of bringing a version to all replicas."""
    return _pull_s(config) + drain_limit_s(config)


def _pull_s(config: Config) -> float:
    """Each of two attempts may have to form the weight group first."""
    return 2 * (2 * config.weights.deadline_s + 20)
