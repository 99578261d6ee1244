"""Which device each role gets. Counts devices; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from verst.config.schema import Config
from verst.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """GPUs (or the part of one) of each trainer rank and each rollout replica; 0 means CPU."""

    trainer_gpus: float
    replica_gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.trainer_gpus else "cpu"


def place(config: Config, gpus: int) -> Placement:
    """One GPU for each rank and replica; if there is only one GPU they share it; without GPUs everything runs on the CPU.

    Raises:
        ConfigError: there are GPUs, but too few.
    """
    wanted = config.train.ranks + config.rollout.replicas
    if gpus == 0:
        return Placement(0.0, 0.0)
    if gpus >= wanted:
        return Placement(1.0, 1.0)
    if gpus == 1 and config.train.ranks == 1:
        share = 1.0 / wanted
        return Placement(share, share)
    raise ConfigError(
        f"train.ranks ({config.train.ranks}) and rollout.replicas ({config.rollout.replicas}) need {wanted} GPUs, there are {gpus}; "
        "one rank and its replicas may also share a single GPU"
    )
