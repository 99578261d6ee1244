"""A machine is lost with all that it had: trainer rank, snapshots, replica, in one case the run's loop. What lives brings the run back."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import verst
from tests.faults.machines import PLACES, Machines, SteeredRun, on
from tests.loop.local import LocalRun, local_run
from tests.loop.test_cluster import wait_for
from verst.journal.audit import audit
from verst.journal.log import JournalReader
from verst.runtime import cluster
from verst.runtime.actors import spawn
from verst.runtime.kept import NAMESPACE
from verst.runtime.launch import worker_env
from verst.training.checkpoints import rank_name
from verst.training.snapshots import snapshot_directory
from verst.weights.location import shared_memory

STEPS = 8
LIMIT_S = 300.0
"""Of a run's start, on a machine that has other things to do."""

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]

SIDES = {"trainer rank 0": "left", "replica 0": "left", "trainer rank 1": "right", "replica 1": "right"}


def run_of(directory: Path, model: Path) -> LocalRun:
    """What the machines of a cluster share is the run's directory; its weights go to the engines by the same disk."""
    values: dict[str, Any] = {
        "run": {"name": "run", "dir": str(directory), "steps": STEPS, "seed": 3},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "max_running": 16, "replicas": 2},
        "reward": {"function": "tests.loop.rewards:slow", "workers": 1},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 1e-3, "ranks": 2, "deadline_s": LIMIT_S},
        "weights": {"location": str(directory / "weights")},
        "checkpoint": {"every_steps": 1000, "export_final": False},
    }
    rows = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]
    return local_run(directory, model, values, prompts=rows)


@dataclass
class Seen:
    """A run from its begin to its end, and what was told."""

    run: LocalRun
    lines: list[str] = field(default_factory=list)
    lost_at: float = 0.0
    timed: list[tuple[float, str]] = field(default_factory=list)

    def tell(self, line: str) -> None:
        self.lines.append(line)
        self.timed.append((time.monotonic(), line))

    def begin(self, machines: Machines, loop: str) -> None:
        """With the loop on one of the machines."""
        run = self.run.run
        options = {"name": cluster._name(run), "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1}
        handle = spawn("loop", SteeredRun, str(run.root), **options, **on(loop)).handle
        ray.get(handle.call.remote("begin"), timeout=LIMIT_S)
        self._address = machines.address

    def watch(self) -> None:
        verst.resume(self.run.run.root, address=self._address, echo=self.tell)

    def digests(self) -> list[str]:
        reader = JournalReader(self.run.run.journal)
        return [reader.commit(step).digest for step in range(1, STEPS + 1)]

    def require_sound(self) -> None:
        found = audit(self.run.run.journal, self.run.run.run_id, worst_staleness=0, exact=True)
        assert found.violations == []
        assert found.groups_unfinished == []
        assert found.groups_trained == 4 * STEPS
        assert list(shared_memory().glob(f"*{self.run.run.run_id}*")) == []


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    made = Machines(worker_env(1, [str(Path(__file__).parents[2])]) | {PLACES: json.dumps(SIDES)})
    try:
        made.join("left")
        made.address = cluster.connect(made.address)
        yield made
    finally:
        ray.shutdown()
        made.close()


def below(machines: Machines, name: str) -> list[str]:
    """Processes of a run on one machine."""
    found = []
    for process in machines.processes(name):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if "Host" in line or "verst." in line:
                found.append(line)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, machines: Machines) -> list[str]:
    machines.join("right")
    seen = Seen(run_of(tmp_path_factory.mktemp("undisturbed"), model))
    seen.begin(machines, "left")
    seen.watch()
    seen.require_sound()
    found = seen.digests()
    assert len(set(found)) == STEPS, "every step must change the weights, or the tests below prove nothing"
    return found


@pytest.mark.parametrize("loop", ["left", "right"])
def test_a_machine_is_lost(tmp_path: Path, model: Path, machines: Machines, undisturbed: list[str], loop: str):
    machines.join("right")
    seen = Seen(run_of(tmp_path, model))
    run = seen.run.run
    own = [snapshot_directory(run.run_id, rank) for rank in range(2)]

    def copied() -> bool:
        """Whether the left machine has the state of the rank on the right."""
        return len(list(own[0].glob(f"step-0*/{rank_name(1, 2)}.json"))) == 2

    def lose() -> None:
        wait_for(copied, limit_s=LIMIT_S)
        assert len([line for line in below(machines, "right") if "KeptHost" in line]) == 3, "a rank, its snapshot holder and a replica"
        machines.lose("right", [own[1]])
        seen.lost_at = time.monotonic()

    seen.begin(machines, loop)
    with ThreadPoolExecutor(1) as beside:
        losing = beside.submit(lose)
        try:
            seen.watch()
        finally:
            for at, line in seen.timed:
                print(f"{at - seen.lost_at:8.1f} {line}")  # noqa: T201 - shown by pytest if the test fails
        losing.result()
    assert seen.digests() == undisturbed
    seen.require_sound()
    wait_for(lambda: not below(machines, "left"))
    back = {
        "left": "trainers: .*trainer rank 1 replaced, restored to step [1-9] from memory",
        "right": r"resumed at step [1-9] \(memory\)",
    }
    assert any(re.match(back[loop], line) for line in seen.lines)
