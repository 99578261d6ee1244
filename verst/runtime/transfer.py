"""How a published version gets from the trainers into the engines.

    file    trainer rank 0 writes it, the engines map it: shared memory, or a disk all can read
    group   trainer rank 0 broadcasts it to the engines, which receive while it sends (`verst.weights.group`)
    shared  trainer rank 0 fills buffers that the engines on its device map (`verst.weights.shared`)

Either way it is verified before it serves, and one that did not arrive whole is brought again whole, once: an engine cannot go back.
Right after, trainer and engines score the probe; what engines generate before its verdict is held back by the loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import WeightMismatch
from verst.observe.intervals import Interval
from verst.runtime.placement import Placement
from verst.runtime.pools import Replicas, Trainers
from verst.runtime.rollout_worker import Pulled
from verst.runtime.trainer_worker import GROUP, Published
from verst.runtime.wait import gather_named, within
from verst.types import Manifest
from verst.weights.push import check_probe, compare_probe

ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Brought:
    """A version that all replicas serve."""

    difference: float  # largest mean |trainer - engine| of the probe's log-probabilities
    stats: dict[str, float]  # what the engines count, in sum
    during: Interval = (0.0, 0.0)
    """When it was brought, by `time.perf_counter`."""
    sending: Interval | None = None
    """When the trainers sent it. None: they had written it before."""


class Transfer:
    """Between all trainer ranks and all replicas of a run. `location` is the directory of files."""

    def __init__(self, config: Config, placement: Placement, trainers: Trainers, replicas: Replicas, location: str) -> None:
        self._trainers, self._replicas = trainers, replicas
        self._deadline_s = config.weights.deadline_s
        self._probe_limit = config.probe_limit
        transport = config.weights.transport or _default(placement, config.train.ranks)
        self._by_group, self._shared = transport != "file", transport == "shared"
        self.location = GROUP if self._by_group else location

    @property
    def reads_trainers(self) -> bool:
        """Whether the weights are read from the trainers while they are brought, and not from a file written before."""
        return self._by_group

    async def open(self, run_id: str) -> None:
        """Brings the members of the group together, once all parts have started. Raises `DeadlineExceeded`."""
        if not self._by_group:
            return
        firsts = list(accumulate(await self._replicas.weight_ranks(), initial=1))  # rank 0 is the trainer
        address = await self._trainers.host_group(f"{run_id}/0", firsts.pop(), shared=self._shared)
        calls = {"the trainers": self._trainers.join_group(address), "the replicas": self._replicas.join_group(address, firsts)}
        await within(gather_named(calls), self._deadline_s + 20, "trainer and replicas to meet in the weight group")

    async def bring(self, published: Published, probe_T: NDArray[np.int32]) -> Brought:
        """All engines load, verify and serve a version, and agree with the trainer about the tokens of the probe.

        Raises `WeightMismatch` after `ATTEMPTS`, the engines are left paused then, and `TrainingDiverged` if they do not agree.
        """
        began = time.perf_counter()
        async with self._replicas.drained():
            pulled, trainer_T, sending = await self._pull(published, probe_T)
        during = began, time.perf_counter()
        stats = {name: (max if name.startswith("weights_") else sum)(p.stats[name] for p in pulled) for name in pulled[0].stats}
        differences = [compare_probe(trainer_T, p.probe_T) for p in pulled]
        for difference in differences:
            check_probe(difference, self._probe_limit, published.manifest.version)
        return Brought(max(differences), stats, during, sending)

    async def _pull(
        self, published: Published, probe_T: NDArray[np.int32]
    ) -> tuple[Sequence[Pulled], NDArray[np.float32], Interval | None]:
        """What the replicas report, the trainer's log-probabilities of the probe, and when it sent if it did."""
        manifest = published.manifest
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if published.probe_T is not None:
                    return await self._replicas.pull(manifest, probe_T), published.probe_T, None
                calls = {"the replicas": self._replicas.pull(manifest, probe_T), "the trainers": self._send(manifest, probe_T)}
                pulled, (trainer_T, sending) = await gather_named(calls)
                return pulled, trainer_T, sending
            except WeightMismatch as error:
                if attempt == ATTEMPTS:
                    raise WeightMismatch(f"after {ATTEMPTS} whole pushes the engines are left paused: {error}") from error
        raise AssertionError("unreachable")

    async def _send(self, manifest: Manifest, probe_T: NDArray[np.int32]) -> tuple[NDArray[np.float32], Interval]:
        began = time.perf_counter()
        return await self._trainers.send(manifest, probe_T), (began, time.perf_counter())


def _default(placement: Placement, ranks: int) -> str:
    """Between GPUs a group; NCCL cannot join two processes on one GPU, which share buffers instead. A file where several are shared."""
    if not placement.trainer_gpus or (placement.shared and ranks > 1):
        return "file"
    return "shared" if placement.shared else "group"
