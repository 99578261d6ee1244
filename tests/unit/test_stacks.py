"""What a process does: told by itself, or seen from outside if it cannot tell."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verst.observe import stacks as module
from verst.observe.stacks import described, dumped, machine, stacks, state_of, write_stacks
from verst.runtime.actors import Host, LocalWorker
from verst.runtime.stacks import KeepStacks, stack_report

LIMIT_S = 10.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Stuck:
    """Its one call waits until it is let go."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def collective(self) -> str:
        self.entered.set()
        self.released.wait(LIMIT_S)
        return "done"


async def test_a_host_answers_while_its_thread_is_stuck():
    host = Host(Stuck)
    stuck: Stuck = host._object
    assert "waits for a call" in await host.stacks()
    calling = asyncio.create_task(host.call("collective"), name="the call")
    await asyncio.to_thread(stuck.entered.wait, LIMIT_S)
    told = await host.stacks()
    assert f"process {os.getpid()} on " in told
    assert "in collective for 0." in told
    assert "in collective\n    self.released.wait(LIMIT_S)" in told
    assert "1 x Host.call (actors.py:" in told
    stuck.released.set()
    assert await calling == "done"
    assert "waits for a call" in await host.stacks()


def test_deep_stacks_and_many_threads_are_bounded():
    def deep(levels: int, entered: threading.Event, leave: threading.Event) -> None:
        if levels:
            deep(levels - 1, entered, leave)
            return
        entered.set()
        leave.wait(LIMIT_S)

    leave, entered = threading.Event(), [threading.Event() for _ in range(60)]
    threads = [threading.Thread(target=deep, args=(200, event, leave)) for event in entered]
    for thread in threads:
        thread.start()
    try:
        assert all(event.wait(LIMIT_S) for event in entered)
        found = stacks()
    finally:
        leave.set()
        for thread in threads:
            thread.join()
    assert len(found) < module._MOST_CHARS + 10
    assert found.endswith("[…]")


async def test_tasks_that_wait_in_one_place_are_one_line():
    async def inner(event: asyncio.Event) -> None:
        await event.wait()

    async def outer(event: asyncio.Event) -> None:
        await inner(event)

    event = asyncio.Event()
    tasks = [asyncio.create_task(outer(event)) for _ in range(50)]
    await asyncio.sleep(0)
    line = next(line for line in stacks().splitlines() if line.startswith("  50 x "))
    assert line.index(".outer (test_stacks.py:") < line.index(".inner (test_stacks.py:") < line.index("Event.wait (locks.py:")
    event.set()
    await asyncio.gather(*tasks)


CHILD = """
import re, sys, time
from verst.observe.stacks import allow_dumps
def keeps_the_lock():
    print("ready", flush=True)
    re.match("(a+)+$", "a" * 60 + "b")
def sleeps():
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[2] == "dumps":
    allow_dumps()
    allow_dumps()
globals()[sys.argv[1]]()
"""


@pytest.fixture
def child() -> Iterator[Callable[..., int]]:
    """Starts a process that does one of `CHILD`'s functions, and returns its number."""
    begun: list[subprocess.Popen[str]] = []

    def start(does: str = "sleeps", dumps: str = "dumps") -> int:
        process = subprocess.Popen([sys.executable, "-c", CHILD, does, dumps], stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield start
    for process in begun:
        process.kill()
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("does", ["sleeps", "keeps_the_lock"])
def test_stacks_of_a_process_that_answers_nobody(child: Callable[..., int], does: str):
    """The second one lets no other thread run."""
    pid, state = child(does), "is sleeping" if does == "sleeps" else "is running"
    until(lambda: state_of(pid) == state)
    for _ in range(2):
        assert f"in {does}\n" in (found := described(pid))
        assert found.startswith(f"its process ({pid}) {state}\n")
        assert found.count("most recent call first") == 1  # not the former dump too


def test_one_without_a_handler_is_sent_nothing(child: Callable[..., int]):
    pid = child("sleeps", "none")
    until(lambda: state_of(pid) == "is sleeping")
    assert dumped(pid) is None
    assert described(pid) == f"its process ({pid}) is sleeping"
    assert state_of(pid) == "is sleeping"


def test_a_stopped_process_is_told_to_be_stopped(child: Callable[..., int]):
    pid = child()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "stopped" in state_of(pid))
    begun = time.monotonic()
    assert described(pid) == f"its process ({pid}) is stopped (SIGSTOP): it goes on after kill -CONT"
    assert time.monotonic() - begun < 0.5
    os.kill(pid, signal.SIGCONT)
    until(lambda: state_of(pid) == "is sleeping")


def test_a_zombie_and_one_that_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: "zombie" in state_of(process.pid))
    assert described(process.pid) == f"its process ({process.pid}) has ended, and its parent has not taken notice (a zombie)"
    process.wait()
    assert described(process.pid) == f"its process ({process.pid}) has ended"


def test_a_machine_is_itself():
    found = subprocess.run(
        [sys.executable, "-c", "from verst.observe.stacks import machine; print(machine())"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == machine()


def test_of_many_files_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MOST_FILES", 3)
    (tmp_path / "run.log").touch()
    written = []
    for number in range(5):
        written.append(write_stacks(tmp_path / "logs", f"report {number}", "Asked for: by a person!"))
        time.sleep(0.002)
    assert sorted((tmp_path / "logs").iterdir()) == written[2:]
    assert written[-1].name.endswith("-asked-for-by-a-person.txt")
    assert written[-1].read_text().startswith("Asked for: by a person!, 2")
    assert written[-1].read_text().endswith("report 4\n")


class Silent(LocalWorker):
    async def stacks(self) -> str:
        return "does not answer within 5 s; its process (7) is stopped"


async def test_a_report_has_every_process(tmp_path: Path):
    workers = [LocalWorker("trainer rank 0", None), Silent("replica 0", None)]
    report = await stack_report(workers)
    assert report.startswith("==== this process\nthread ")
    assert report.endswith("==== trainer rank 0\nin this process\n\n==== replica 0\ndoes not answer within 5 s; its process (7) is stopped")
    (line,) = await KeepStacks(lambda: workers, tmp_path)("a deadline passed")
    (path,) = tmp_path.iterdir()  # noqa: ASYNC240 - nothing else runs here
    assert line == f"what each process did then: {path}"


async def test_what_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "logs").touch()
    (line,) = await KeepStacks(lambda: [LocalWorker("trainer rank 0", None)], tmp_path / "logs")("asked for")
    assert line.startswith("what each process did could not be written: FileExistsError: ")
