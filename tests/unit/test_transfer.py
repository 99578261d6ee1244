"""How a version reaches the engines: repeated whole after a mismatch, and by a group that trainer and replicas make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verst.config.schema import Config
from verst.errors import WeightMismatch
from verst.runtime.placement import Placement
from verst.runtime.transfer import Transfer
from verst.runtime.workers import GROUP, Probe, Pulled
from verst.types import Manifest

PROBE = Probe(np.zeros(1, np.int32), np.zeros(1, np.float32), 0.1)


class Side:
    """Trainers and replicas at once; records what is asked of them. The first `wrong` pulls find a mismatch."""

    def __init__(self, wrong: int = 0) -> None:
        self.events: list[Any] = []
        self._wrong = wrong

    async def pull(self, manifest: Manifest, probe: Probe) -> Pulled:
        self.events.append("pull")
        if self._wrong:
            self._wrong -= 1
            raise WeightMismatch("1 different: scale")
        return Pulled(0.5, {})

    async def send(self, manifest: Manifest) -> None:
        self.events.append("send")

    async def weight_ranks(self) -> list[int]:
        return [1, 2, 1]

    async def host_group(self, name: str, world: int, *, shared: bool) -> str:
        self.events.append((name, world, shared))
        return "the address"

    async def join_group(self, *address_and_ranks: Any) -> None:
        self.events.append(address_and_ranks)


def transfer(side: Any, transport: str | None = None, gpus: float = 0.0) -> Transfer:
    weights = {"transport": transport} if transport else {}
    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "weights": weights})
    return Transfer(config, Placement(gpus, gpus, shared=0 < gpus < 1), side, side, str(Path("somewhere")))


async def test_a_file_is_pulled_and_nothing_else_happens():
    side = Side()
    by_file = transfer(side)
    await by_file.open("run")
    assert (await by_file.bring(Manifest(1, "", (), ""), PROBE)).difference == 0.5
    assert (side.events, by_file.location) == (["pull"], "somewhere")


@pytest.mark.parametrize("transport", ["group", "shared"])
async def test_a_version_that_did_not_arrive_whole_is_brought_again_whole(transport: str):
    side = Side(wrong=1)
    by_group = transfer(side, transport)
    await by_group.open("run")
    assert (await by_group.bring(Manifest(1, GROUP, (), ""), PROBE)).difference == 0.5
    met = [("run/0", 5, transport == "shared"), ("the address",), ("the address", [1, 2, 4])]
    assert side.events == [*met, "pull", "send", "pull", "send"]


async def test_after_two_failures_it_is_told():
    side = Side(wrong=2)
    with pytest.raises(WeightMismatch, match="after 2 whole pushes the engines are left paused: 1 different: scale"):
        await transfer(side).bring(Manifest(1, "", (), ""), PROBE)
    assert side.events == ["pull", "pull"]


@pytest.mark.parametrize(("gpus", "location", "met"), [(0.0, "somewhere", []), (0.5, GROUP, [True]), (1.0, GROUP, [False])])
async def test_the_default_depends_on_the_devices(gpus: float, location: str, met: list[bool]):
    by_default = transfer(side := Side(), gpus=gpus)
    await by_default.open("run")
    assert by_default.location == location
    assert [event[2] for event in side.events[:1]] == met
