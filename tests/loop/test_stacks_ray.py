"""Stacks of actors that work, that are stopped, and that are gone, as a run that stands still asks for them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from verst.runtime.actors import spawn
from verst.runtime.stacks import stack_report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]


class Stuck:
    def pid(self) -> int:
        return os.getpid()

    def collective(self) -> None:
        threading.Event().wait(60)

    async def blocks_its_event_loop(self) -> None:
        time.sleep(60)  # noqa: ASYNC251 - the defect of which it is about


async def test_whoever_does_not_answer_is_described():
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    names = ["waits", "works", "blocks", "stopped", "dead"]
    workers = {name: spawn(name, Stuck, env=env) for name in names}
    pids = dict(zip(names, await asyncio.gather(*(worker.call("pid") for worker in workers.values())), strict=True))
    running = [
        asyncio.ensure_future(workers["works"].call("collective")),
        asyncio.ensure_future(workers["blocks"].call("blocks_its_event_loop")),
    ]
    try:
        await asyncio.sleep(1.0)
        os.kill(pids["stopped"], signal.SIGSTOP)
        workers["dead"].kill()
        begun = time.monotonic()
        report = await stack_report(list(workers.values()))
        assert time.monotonic() - begun < 8
    finally:
        os.kill(pids["stopped"], signal.SIGCONT)
        for worker in workers.values():
            worker.kill()
        await asyncio.gather(*running, return_exceptions=True)
    found = dict(part.split("\n", 1) for part in report.split("==== ")[1:])
    assert "waits for a call" in found["waits"]
    assert "in collective for" in found["works"]
    assert "threading.Event().wait(60)" in found["works"]
    silent = "does not answer within 5 s; its process"
    first, _, stacks = found["blocks"].partition("\n")
    states = ("sleeping", "running")  # its main thread is Ray's, and may be at work for a moment
    assert first in {f"{silent} ({pids['blocks']}) is {state}" for state in states}
    assert "in blocks_its_event_loop" in stacks
    assert found["stopped"].startswith(f"{silent} ({pids['stopped']}) is stopped (SIGSTOP)")
    assert found["dead"].startswith("its process has ended: ")
