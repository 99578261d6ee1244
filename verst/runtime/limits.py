"""How long a step, a group and a version may take, from the limits that a run file sets for their parts.

Each is longer than the sum of those inside it, so that the innermost expires first and names what was really awaited.
"""

from __future__ import annotations

from verst.config.schema import Config

_CLOSE_S = 15.0
"""Longer than an environment may take to close (`verst.rollout.boundary`), which it does after the limit of its group."""

_RESTART_S = 10.0
"""What a reward worker may take to be replaced."""


def turn_limit_s(config: Config) -> float:
    """Limit of a step up to its checkpoint, hand-overs of shared devices included. Every call in it has a limit of its own."""
    return (8 + 2 * config.train.minibatches * config.train.epochs) * config.train.deadline_s


def rolling_deadline_s(config: Config, groups: int, *, shared: bool) -> float:
    """Limit of rolling one group among so many, once it has begun: those that wait for a place in the engine get the time of those before.

    `shared`: the trainer uses the device in between, once for each step that rollout may be ahead.
    """
    rollout = config.rollout
    limit_s = rollout.deadline_s * (1 + groups * config.rolled_per_group // rollout.max_running)
    return limit_s + (config.worst_staleness * turn_limit_s(config) if shared else 0.0)


def group_deadline_s(config: Config, groups: int, *, shared: bool) -> float:
    """Limit of one group among so many on one replica, from there and back: a version that it waits for, rolling, scoring."""
    scoring_s = groups * config.rollout.group_size * (config.reward.deadline_s + _RESTART_S)  # by one worker after the other
    waits = config.weights.in_flight == "finish" and not shared
    version_s = drain_limit_s(config) + config.weights.deadline_s if waits else 0.0
    return version_s + rolling_deadline_s(config, groups, shared=shared) + _CLOSE_S + scoring_s


def drain_limit_s(config: Config) -> float:
    """Limit of finishing what is in flight before a version; 0 if it need not finish."""
    return rolling_deadline_s(config, config.capacity_groups, shared=False) + _CLOSE_S if config.weights.in_flight == "finish" else 0.0


def pull_limit_s(config: Config) -> float:
    """Limit of bringing a version to all replicas: each of two attempts may have to form the weight group first."""
    return 2 * (2 * config.weights.deadline_s + 20) + drain_limit_s(config)
