"""Whole GPUs reserved with Ray for several processes each: left to itself, Ray would put two trainer ranks on one GPU."""

from __future__ import annotations

import contextlib
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verst.runtime.placement import Placement
from verst.runtime.wait import within


async def reserve(placement: Placement, count: int, opened: contextlib.AsyncExitStack, deadline_s: float) -> list[dict[str, Any]]:
    """Options of Ray for what goes to the first GPU, the second, …: none unless GPUs are shared. They are given back when `opened` ends.

    Raises `DeadlineExceeded` if Ray does not give `count` whole GPUs in time.
    """
    if not (placement.shared and placement.trainer_gpus):
        return [{}] * count
    group = placement_group([{"GPU": 1.0}] * count)
    opened.callback(remove_placement_group, group)
    await within(group.ready(), deadline_s, f"Ray to give {count} whole GPUs: do others use some of them?")
    return [{"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)} for i in range(count)]
