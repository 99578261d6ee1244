"""A run as its command starts it, in processes of its own, whose loop strikes anyone of them: also itself, or all at once.

The loop dies with what it has planned, so cells are in a file, and those that have struck in another one beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.campaign import MARK, Campaign, Cell, tell_of_records
from tests.loop.local import LocalRun
from verst.fault_injection import Fault, FaultInjector
from verst.journal.log import Journal
from verst.rollout.recorded import Piece
from verst.runtime import attend, launch, service
from verst.runtime.actors import RayWorker
from verst.runtime.kept import Kept
from verst.runtime.placement import Placement
from verst.runtime.replica import Replica

PLAN = "VERST_FAULT_PLAN"
"""The environment variable with the file of cells."""

LOOP, TREE = "loop", "whole tree"
_LIFE_S = 900.0
_GONE_S = 30.0
_DRIVER = "import sys; from tests.faults.mortal import resume; resume(sys.argv[1])"


class LoopCampaign(Campaign):
    """In the loop's own process: what an earlier loop has left of the plan."""

    def __init__(self, plan: Path) -> None:
        self._struck = plan.with_suffix(".struck")
        super().__init__([Cell(**cell) for cell in json.loads(plan.read_text())][len(struck(plan)) :])

    async def _strike(self, fault: Fault) -> None:
        if fault.victim in (LOOP, TREE):
            await asyncio.sleep(fault.delay_s)
            self._keep(fault)
            if fault.victim == TREE:
                _kill_marked(os.environ[MARK])
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._strike(fault)
        if fault.struck is not None:
            self._keep(fault)

    def _keep(self, fault: Fault) -> None:
        with self._struck.open("a") as kept:
            kept.write(f"{fault.child or fault.struck or fault.victim}: {fault.moment}\n")


def struck(plan: Path) -> list[str]:
    """Whom the cells of a plan have hit, in order."""
    kept = plan.with_suffix(".struck")
    return kept.read_text().splitlines() if kept.exists() else []


class MortalService(service.RunService):
    """The run's own, with a watch over the calls to its processes, adopted ones included."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._injector: FaultInjector = LoopCampaign(Path(os.environ[PLAN]))

    async def _train(self) -> None:
        tell_of_records(asyncio.get_running_loop(), self._injector.moment)
        await super()._train()

    def _processes(self, placement: Placement) -> Kept | None:
        kept = super()._processes(placement)
        assert kept is not None
        self._spawn = lambda *args, **options: self._injector.watch(kept.spawn(*args, **options))
        return kept

    async def _adopted(self, kept: Kept | None, journal: Journal) -> tuple[list[Replica], dict[int, list[Piece]]]:
        replicas, in_flight = await super()._adopted(kept, journal)
        for replica in replicas:
            assert isinstance(replica.worker, RayWorker)
            replica.worker = self._injector.watch(replica.worker)
        return replicas, in_flight


def resume(root: str) -> None:
    """What the processes of `lives` do."""
    service.RunService = MortalService  # type: ignore[misc]
    attend._DEATHS = 1000  # a plan may kill more loops in ten minutes than are taken for a fault of the run
    launch.resume(root, echo=lambda line: print(line, flush=True))  # noqa: T201 - the output of a command


def lives(run: LocalRun, cells: Sequence[Cell] = ()) -> list[str]:
    """Runs to the end with faults, resumed after each death of the whole tree. Returns the output of each life.

    Its processes are marked with the id of the run.
    """
    plan = run.run.root.with_suffix(".plan")
    plan.write_text(json.dumps([vars(cell) for cell in cells]))
    outputs: list[str] = []
    code = -1
    while code:
        code, output = _life(run, plan)
        outputs.append(output)
        if code:
            assert code == -signal.SIGKILL, output
            assert struck(plan)[-1].startswith(TREE), output
            _require_gone(run.run.run_id)
    assert len(struck(plan)) == len(cells), f"the run ended before: {cells[len(struck(plan)) :]}"
    return outputs


def _life(run: LocalRun, plan: Path) -> tuple[int, str]:
    """From its start, or from where it was, to its end or death: exit code and output."""
    env = os.environ | {MARK: run.run.run_id, PLAN: str(plan)}
    command = [sys.executable, "-c", _DRIVER, str(run.run.root)]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=_LIFE_S)
    except BaseException:
        _kill_marked(run.run.run_id)
        raise
    print(output)  # noqa: T201 - shown by pytest if the test fails
    return process.returncode, output


def _require_gone(token: str) -> None:
    limit = time.monotonic() + _GONE_S
    while left := [*marked(token)]:
        assert time.monotonic() < limit, f"processes that outlived SIGKILL: {left}"
        time.sleep(0.05)


def _kill_marked(token: str) -> None:
    for pid in [*marked(token)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(token: str) -> Iterator[int]:
    """Processes with this mark that live, except this one."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == token:
                yield process.pid
