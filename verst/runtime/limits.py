"""How long a step, a group and a version may take, from the limits that a run file sets for their parts."""

from __future__ import annotations

from verst.config.schema import Config


def turn_limit_s(config: Config) -> float:
    """Limit of a step up to its checkpoint, hand-overs of shared devices included. Every call in it has a limit of its own."""
    return (8 + 2 * config.train.minibatches * config.train.epochs) * config.train.deadline_s


def rolling_deadline_s(config: Config, groups: int, *, shared: bool) -> float:
    """Limit of rolling one group among so many: those that wait for a place in the engine get the time of those before them.

    `shared`: the trainer uses the device in between, once for each step that rollout may be ahead.
    """
    rollout = config.rollout
    limit_s = rollout.deadline_s * (1 + groups * config.rolled_per_group // rollout.max_running)
    if config.weights.in_flight == "finish":  # and for others to finish before a version that it waits for
        limit_s = 2 * limit_s + config.weights.deadline_s
    return limit_s + (config.worst_staleness * turn_limit_s(config) if shared else 0.0)


def drain_limit_s(config: Config) -> float:
    """Limit of finishing what is in flight before a version; 0 if it need not finish."""
    return rolling_deadline_s(config, config.capacity_groups, shared=False) if config.weights.in_flight == "finish" else 0.0


def pull_limit_s(config: Config) -> float:
    """Limit of bringing a version to all replicas: each of two attempts may have to form the weight group first."""
    return 2 * (2 * config.weights.deadline_s + 20) + drain_limit_s(config)
