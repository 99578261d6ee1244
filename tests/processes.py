"""Processes that tests start: copies of one that has imported PyTorch and transformers, which is most of what a process costs."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = ["tests.unit.fsdp_cases", "tests.contracts.engine_cases"]
"""Modules that are imported once. The first process of all decides; later ones import what is not among its modules."""


def copies(*modules: str) -> ForkServerContext:
    """A context like "spawn", whose processes begin with these modules, or those of `PRELOADED`, imported.

    They have the environment of the first one's start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(modules or PRELOADED)])
    return context
