"""Ends or stops processes of a real run at chosen moments, for tests of what survives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst.runtime.actors import RayWorker, Worker, WorkerDied, spawn


@dataclass
class Fault:
    """A signal to one process of a run. `victim` and `moment` are as in `FaultInjector.plan`."""

    victim: str
    moment: str
    nth: int = 1
    signal: signal.Signals = signal.SIGKILL
    delay_s: float = 0.0
    child: str | None = None
    struck: str | None = None
    """What it hit: the name of the process, once it has."""
    pid: int = 0
    """Of the process that it hit."""
    at: float = 0.0
    """When: seconds of `time.monotonic`."""


class FaultInjector:
    """Ends or stops processes of a run under Ray at chosen moments: `RunService(root, injector.spawn)` is the run with its faults.

    A moment is a call to a process, such as "trainer rank 1: optimizer_step" or "replica: roll", or what the test itself calls one
    (`moment`). A victim is named by its role, such as "trainer rank 0" or "replica": of several the newest that still lives.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._workers: list[RayWorker] = []
        self._seen: Counter[str] = Counter()
        self._striking: set[asyncio.Task[None]] = set()

    def plan(self, victim: str, moment: str, nth: int = 1, *, kill: bool = True, delay_s: float = 0.0, child: str | None = None) -> Fault:
        """Strikes the victim when the moment comes for the nth time from now on, so long after it. `kill` False stops it: it hangs.

        `child`: strikes the first process below the victim whose command line has these words instead, such as "verst.rewards.worker".
        """
        sent = signal.SIGKILL if kill else signal.SIGSTOP
        fault = Fault(victim, moment, nth + self._seen[moment], sent, delay_s, child)
        self.faults.append(fault)
        return fault

    def moment(self, name: str) -> None:
        """Something happens now that faults may have been planned for. In the event loop of the run."""
        self._seen[name] += 1
        for fault in self.faults:
            if fault.struck is None and (fault.moment, fault.nth) == (name, self._seen[name]):
                task = asyncio.get_running_loop().create_task(self._strike(fault))
                self._striking.add(task)
                task.add_done_callback(self._striking.discard)

    async def _strike(self, fault: Fault) -> None:
        await asyncio.sleep(fault.delay_s)
        for worker in reversed(self._workers):
            if worker.name.startswith(fault.victim):
                with suppress(WorkerDied, ProcessLookupError):
                    pid = (await worker.where()).pid
                    fault.pid = pid if fault.child is None else _below(pid, fault.child)
                    os.kill(fault.pid, fault.signal)
                    fault.struck, fault.at = worker.name, time.monotonic()
                    return

    def spawn(self, role: str, factory: Callable[..., Any], *args: Any, **options: Any) -> Worker:
        """As the run's own, with a watch over the calls."""
        return self.watch(spawn(role, factory, *args, **options))

    def watch(self, worker: RayWorker) -> Worker:
        """A process that somebody else has started, with a watch over the calls to it."""
        watched = _Watched(worker.name, worker.handle)
        watched.injector = self
        self._workers.append(watched)
        return watched


def _below(pid: int, words: str) -> int:
    """The first process below one on this machine whose command line has these words. Raises `ProcessLookupError` if there is none."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    for child in sorted(below - {pid}):
        with suppress(OSError):
            if words in Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                return child
    raise ProcessLookupError(f"process {pid} has no process below it with {words!r} in its command line")


class _Watched(RayWorker):
    injector: FaultInjector

    async def call(self, method: str, /, *args: Any) -> Any:
        self._tell(method)
        return await super().call(method, *args)

    async def post(self, method: str, /, *args: Any) -> Any:
        self._tell(method)
        return await super().post(method, *args)

    def _tell(self, method: str) -> None:
        role = self.name.rstrip("0123456789 ")
        for name in {self.name, role}:
            self.injector.moment(f"{name}: {method}")
