"""Trainer ranks in processes of their own, which leave what they found in files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.processes import copies
from verst.training.distributed import Rendezvous


def saved_by_ranks(
    run_rank: Callable[..., None], directory: Path, *args: Any, world: int = 2, limit_s: float = 120.0, preload: tuple[str, ...] = ()
) -> list[Any]:
    """What each rank has saved as `directory/rankN.pt`, in order, once all have ended well within `limit_s` seconds.

    Each is a process that calls `run_rank(rank, str(directory), address, *args)`, with the address of a `Rendezvous`. `preload`: as of
    `tests.processes.copies`.
    """
    context, meeting = copies(*preload), Rendezvous()
    ranks = [context.Process(target=run_rank, args=(rank, str(directory), meeting.address, *args), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        end = time.monotonic() + limit_s
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
