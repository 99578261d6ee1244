"""Machines of a Ray cluster, all on this one: each a raylet with processes of its own, which are lost together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.loop.test_cluster import end_tree, free_port, wait_for
from verst.runtime.actors import Worker
from verst.runtime.cluster import ClusterRun
from verst.runtime.kept import Kept
from verst.runtime.placement import Placement

LABEL = "machine"
PLACES = "VERST_TEST_PLACES"
"""The environment variable that says which role of a run begins on which machine, as JSON."""


def on(machine: str) -> dict[str, Any]:
    """Options of Ray: there, or on the left one once that is lost. Soft affinity is not heeded for machines that have just joined."""
    return {"label_selector": {LABEL: machine}, "fallback_strategy": [{"label_selector": {LABEL: "left"}}]}


class SteeredRun(ClusterRun):
    """Whose trainer ranks and replicas begin where `PLACES` says: without GPUs Ray would place them anywhere."""

    def _processes(self, placement: Placement) -> Kept | None:
        kept, places = super()._processes(placement), json.loads(os.environ[PLACES])
        assert kept is not None, "a run on a cluster starts processes that outlive its loop"

        def spawn(role: str, *args: Any, **options: Any) -> Worker:
            return kept.spawn(role, *args, **options, **(on(places[role]) if role in places else {}))

        self._spawn = spawn
        return kept


class Machines:
    """A head, on which nothing of a run is, and others that join it and are lost. `env`: what their processes have as environment, too."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = os.environ | env
        self._place = tempfile.mkdtemp(prefix="vm", dir="/tmp")  # short: sockets lie below it
        self._open: dict[str, subprocess.Popen[Any]] = {}
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._start("head", "--head", f"--port={port}", f"--temp-dir={self._place}", "--include-dashboard=false")

    def join(self, name: str) -> None:
        """Unless it is there."""
        if name in self._open:
            return
        self._start(name, f"--address={self.address}", RAY_AUTH_MODE="token")  # which the head has made

    def _start(self, name: str, *arguments: str, **variables: str) -> None:
        common = [f"--labels={LABEL}={name}", "--num-cpus=2", "--disable-usage-stats", "--block", f"--object-store-memory={1 << 27}"]
        log = Path(self._place) / f"{name}-{time.monotonic_ns()}.log"
        with log.open("w") as out:
            self._open[name] = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", *arguments, *common],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=self._env | variables,
                start_new_session=True,
            )
        wait_for(lambda: "Ray runtime started" in log.read_text(), self._open[name])

    def processes(self, name: str) -> list[psutil.Process]:
        """Of one machine: its raylet, and all that was started below it."""
        return psutil.Process(self._open[name].pid).children(recursive=True)

    def lose(self, name: str, memory: Sequence[Path]) -> None:
        """As a power failure does: every process at once, and what it had in memory, which another machine would not see."""
        process = self._open.pop(name)
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()  # none of them may notice the death of another
        end_tree(process)
        for directory in memory:
            shutil.rmtree(directory)

    def close(self) -> None:
        for process in self._open.values():
            end_tree(process)
        shutil.rmtree(self._place, ignore_errors=True)
