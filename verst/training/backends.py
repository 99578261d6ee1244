"""Which training backend a run file names."""

from __future__ import annotations

from verst.config.schema import Config
from verst.model_spec import install
from verst.protocols import TrainBackend


def make_backend(config: Config, *, rank: int, world: int, device: str | None) -> TrainBackend:
    """One trainer rank; from two on the ranks have met (`verst.training.distributed.init_distributed`)."""
    install(config.model.spec)
    if config.train.backend == "fsdp":
        from verst.training.fsdp import FsdpBackend

        return FsdpBackend(config, rank=rank, world=world, device=device)
    from verst.training.megatron.backend import MegatronBackend

    return MegatronBackend(config, rank=rank, world=world, device=device, arguments=config.train.megatron)
