"""Which engine a run file names."""

from __future__ import annotations

from pathlib import Path

from verst.algorithms.table import records_routes
from verst.config.schema import Config
from verst.protocols import Engine


def make_engine(config: Config, *, slot: int, device: str, shared: bool, log: Path) -> Engine:
    """One replica's engine, not yet started. `slot`: which of `rollout.urls` is its server. `log` takes what its own processes print.

    `shared`: it has to be able to give its device memory to others.
    """
    rollout = config.rollout
    record_routes = records_routes(config)
    if rollout.engine == "hf":
        from verst.rollout.hf import HFEngine

        return HFEngine(
            config.model.path,
            dtype=config.model.dtype,
            device=device,
            max_running=rollout.max_running,
            max_model_tokens=config.max_trajectory_tokens,
            deterministic=config.run.deterministic,
            record_routes=record_routes,
        )
    from verst.rollout.sglang import SGLangEngine

    saver = {"enable_memory_saver": True} if shared and device != "cpu" else {}
    return SGLangEngine(
        config.model.path,
        dtype=config.model.dtype,
        device=device,
        max_running=rollout.max_running,
        max_model_tokens=config.max_trajectory_tokens,
        deterministic=False,
        arguments=saver | rollout.sglang,
        url=rollout.urls[slot] if rollout.urls else None,
        record_routes=record_routes,
        log=log,
    )


def make_teacher(config: Config, directory: str, device: str) -> Engine:
    """The engine of the teacher, not yet started: always `hf`, since all that is asked of it is one prefill at a time."""
    from verst.rollout.hf import HFEngine

    return HFEngine(
        directory,
        dtype=config.model.dtype,
        device=device,
        max_running=1,
        max_model_tokens=config.max_trajectory_tokens,
        deterministic=config.run.deterministic,
    )
