"""Which engine a run file names."""

from __future__ import annotations

from pathlib import Path

from verst.config.schema import Config
from verst.protocols import Engine


def make_engine(config: Config, *, replica: int, device: str, log: Path) -> Engine:
    """One replica's engine, not yet started. `log` takes what its own processes print."""
    rollout = config.rollout
    if rollout.engine == "hf":
        from verst.rollout.hf import HFEngine

        return HFEngine(
            config.model.path,
            dtype=config.model.dtype,
            device=device,
            max_running=rollout.max_running,
            max_model_tokens=config.max_trajectory_tokens,
            deterministic=config.run.deterministic,
        )
    from verst.rollout.sglang import SGLangEngine

    return SGLangEngine(
        config.model.path,
        dtype=config.model.dtype,
        device=device,
        max_running=rollout.max_running,
        max_model_tokens=config.max_trajectory_tokens,
        deterministic=False,
        arguments=rollout.sglang,
        url=rollout.urls[replica] if rollout.urls else None,
        log=log,
    )
