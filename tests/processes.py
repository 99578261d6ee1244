"""Processes that tests start: copies of one that has imported PyTorch and transformers, which is most of what a process costs."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.context import ForkServerContext

import psutil

PRELOADED = ["tests.unit.fsdp_cases", "tests.contracts.engine_cases"]
"""Modules that are imported once. The first process of all decides; later ones import what is not among its modules."""


def copies(*modules: str) -> ForkServerContext:
    """A context like "spawn", whose processes begin with these modules, or those of `PRELOADED`, imported.

    They have the environment of the first one's start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(modules or PRELOADED)])
    return context


def lives(pid: int) -> bool:
    """Whether there is such a process, other than a zombie: a killed one stays that until its parent takes notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
