"""One fault after another in a long run, and what must be true of the run in the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.loop.local import LocalRun
from tests.processes import lives
from verst.config.schema import Config
from verst.fault_injection import Fault, FaultInjector
from verst.journal.audit import Audit, audit
from verst.journal.log import Journal, JournalReader
from verst.runtime.actors import Worker
from verst.runtime.placement import Placement
from verst.runtime.rundir import RunDirectory
from verst.runtime.service import RunService
from verst.weights.location import shared_memory

ONE_GPU = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""The environment variable by which Ray gives each process all GPUs, whatever it counts."""

MARK = "VERST_FAULTS"
"""The environment variable by which every process below a test is known, also one whose parent has died."""

_GONE_S = 20.0


@dataclass(frozen=True)
class Cell:
    """Who is struck, and when: a moment in words, as in `MOMENTS`."""

    victim: str
    moment: str
    kill: bool = True

    def __str__(self) -> str:
        return f"{self.victim} {'killed' if self.kill else 'stopped'} {self.moment}"


MOMENTS = {
    "generating": ("replica: roll", 0.01),
    "scoring": ("append_group", 0.0),
    "mid-forward": ("trainer rank 1: forward_backward", 0.002),
    "mid-all-reduce": ("trainer rank 1: forward_backward", 0.015),
    "mid-optimizer": ("trainer rank 0: optimizer_step", 0.0),
    "mid-commit": ("append_commit", 0.0),
    "mid-publish": ("replica: pull", 0.0),
    "mid-checkpoint": ("trainer rank 0: written", 0.0),
}
"""Each is a call, or a record on its way into the journal, and a delay in seconds behind it."""

CHILDREN = {
    "reward worker": ("replica", "verst.rewards.worker"),
    "server": ("replica", "verst.rollout.sglang.launch"),
    "scheduler": ("replica", "sglang::scheduler"),
}
"""Processes that are no worker of the run but are below one, and words of their command lines."""


class Campaign(FaultInjector):
    """The next fault is planned when a step is committed after the one before has struck, and a process that was stopped has been ended."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__()
        self._left = list(cells)

    def moment(self, name: str) -> None:
        super().moment(name)
        if name != "append_commit" or self._striking:
            return
        for fault in self.faults:
            if fault.struck is None and self._seen[fault.moment] >= fault.nth:  # nobody was there: a dead one is replaced when it is needed
                fault.nth = self._seen[fault.moment] + 1
        if self._left and all(fault.struck and not _stands(fault) for fault in self.faults):
            cell = self._left.pop(0)
            (moment, delay_s), (victim, child) = MOMENTS[cell.moment], CHILDREN.get(cell.victim, (cell.victim, None))
            self.plan(victim, moment, kill=cell.kill, delay_s=delay_s, child=child)

    @property
    def unstruck(self) -> list[Fault | Cell]:
        """What the run ended before."""
        return [*(fault for fault in self.faults if fault.struck is None), *self._left]


def tell_of_records(loop: asyncio.AbstractEventLoop, tell: Callable[[str], None], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Tells, in the event loop, of each record of a group or a commit on its way to the disk."""
    for name in ("append_group", "append_commit"):
        original = getattr(Journal, name)

        def told(self: Journal, *record: Any, original: Any = original, name: str = name) -> None:
            loop.call_soon_threadsafe(tell, name)
            original(self, *record)

        patch(Journal, name, told)


def _stands(fault: Fault) -> bool:
    return fault.signal == signal.SIGSTOP and lives(fault.pid)


def on_one_gpu(spawn: Callable[..., Worker]) -> Callable[..., Worker]:
    """Starts processes that share a GPU as if each were on a machine of its own: NCCL connects no two processes on one GPU of one machine.

    Its collectives go over a socket then. For a Ray that counts several GPUs where there is one, with `ONE_GPU` in the environment.
    """

    def spawn_apart(role: str, *args: Any, env: Mapping[str, str] | None = None, **options: Any) -> Worker:
        return spawn(role, *args, env={**(env or {}), "NCCL_HOSTID": role}, **options)

    return spawn_apart


async def under(injector: FaultInjector, run: LocalRun, spawn: Callable[..., Worker] | None = None, gpus: float = 0.0) -> list[str]:
    """Runs to the end with its faults, each rank and replica on so many GPUs. Returns what was told."""
    service = RunService(str(run.run.root), spawn or injector.spawn, Placement(gpus, gpus))
    try:
        await service.run()
    finally:
        _, lines = await service.lines(0, 0)
        print("\n".join(lines))  # noqa: T201 - shown by pytest if the test fails
    return lines


def digests(run: LocalRun) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(step).digest for step in range(1, _config(run).run.steps + 1)]


def require_sound(run: LocalRun, token: str) -> Audit:
    """Every group was trained once, none is lost; no process of the run is left, and none of its shared memory."""
    config = _config(run)
    found = audit(run.run.journal, run.run.run_id, worst_staleness=config.worst_staleness, exact=True)
    assert found.violations == []
    assert found.groups_unfinished == []
    assert found.groups_trained == config.run.steps * config.train.groups_per_step
    deadline = time.monotonic() + _GONE_S
    while (left := list(_workers(token))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [], "processes that outlived the run"
    assert list(shared_memory().glob(f"*{run.run.run_id}*")) == []
    return found


def _workers(token: str) -> Iterator[str]:
    """Command lines of processes that do the work of a run, of all that were started below this one."""
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.environ().get(MARK) != token:
                continue
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(words in line for words in ("ray::Host", "ray::KeptHost", "verst.", "sglang")):
            yield f"{process.pid} {process.status()}: {line[:120]}"


def _config(run: LocalRun) -> Config:
    return RunDirectory.open(run.run.root)[1]


async def replay_equals(run: LocalRun) -> None:
    """A replay of the journal from the initial model reaches the weights of every step."""
    import verst

    found = await asyncio.to_thread(verst.replay, Path(run.run.root), 0, echo=run.lines.append)
    assert [step.same for step in found.steps] == [True] * _config(run).run.steps
