"""Which device each role gets. Counts devices; starts nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verst.config.algorithms import DistillConfig
from verst.config.schema import Config
from verst.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """GPUs (or the part of one) of each trainer rank and each rollout replica; 0 means CPU.

    `shared`: rank i has the GPU of replicas i, i + ranks, … and they use it in turn (`verst.runtime.lease`).
    """

    trainer_gpus: float
    replica_gpus: float
    shared: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.trainer_gpus else "cpu"

    @property
    def teacher_device(self) -> str:
        """Of the teacher, if there is one: the replica's second GPU, else the engine's device."""
        return "cuda:1" if self.replica_gpus > 1 else self.device


def reward_gpus(config: Config) -> int:
    """Whole GPUs on which nothing else of the run is."""
    return math.ceil(config.reward.actor_gpus or 0.0)


def place(config: Config, gpus: int) -> Placement:
    """One GPU for each rank and replica; with a GPU for each rank only, the replicas share them; without GPUs everything runs on the CPU.

    What the reward needs is not theirs. A replica with a teacher has a second GPU for it, where there are as many; else both are on one.

    Raises:
        ConfigError: there are GPUs, but too few; or the transport of weights does not work within one GPU.
    """
    ranks, replicas = config.train.ranks, config.rollout.replicas
    reward = reward_gpus(config)
    if reward > gpus:
        raise ConfigError(f"reward.actor_gpus needs {reward} GPU(s), there are {gpus}: set it to 0 for a reward on the CPU")
    if gpus == 0:
        return Placement(0.0, 0.0)
    gpus -= reward
    if isinstance(config.algorithm, DistillConfig) and gpus >= ranks + 2 * replicas:
        return Placement(1.0, 2.0)
    if gpus >= ranks + replicas:
        return Placement(1.0, 1.0)
    if gpus != ranks or replicas % ranks:
        raise ConfigError(
            f"train.ranks ({ranks}) and rollout.replicas ({replicas}) need {ranks + replicas} GPUs, there are {gpus}"
            f"{f' beside {reward} of the reward' if reward else ''}; "
            "replicas may also share the GPUs of the ranks, equally many on each, where there is one GPU for each rank"
        )
    if config.weights.transport == "group" or (config.weights.transport == "shared" and ranks > 1):
        raise ConfigError(
            f"weights.transport {config.weights.transport} does not work where replicas share the GPUs of {ranks} rank(s): NCCL connects "
            "no two processes on one GPU, and buffers are shared on one GPU only. Remove it"
        )
    share = ranks / (ranks + replicas)
    return Placement(share, share, shared=True)
