"""What processes do at this moment: the Python stacks of their threads and tasks, and, of one that cannot answer, what the kernel tells.

A process that called `allow_dumps` writes its stacks on SIGUSR2 into memory that others on the machine can read, by a handler in C: also
while a thread keeps Python's lock. One without a handler would be ended by the signal, so only the former are ever sent one.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

_MEMORY = "verst-stacks"
_MOST_CHARS = 40_000
"""Of one process."""
_MOST_FRAMES = 40
"""Of one thread: the innermost."""
_MOST_TASKS = 20
_MOST_FILES = 20
"""In a run's logs; the oldest go first."""
_SETTLED_S = 0.05
"""A dump is complete once it has not grown for so long."""

_STATES = {
    "R": "is running",
    "S": "is sleeping",
    "D": "waits in the kernel and cannot be interrupted: for a disk, a network file system or a driver",
    "T": "is stopped (SIGSTOP): it goes on after kill -CONT",
    "t": "is stopped by a debugger",
    "Z": "has ended, and its parent has not taken notice (a zombie)",
    "X": "has ended",
    "I": "is idle",
}


def stacks() -> str:
    """Of this process: each thread's stack, innermost call last, and where its asyncio tasks wait. Bounded in length."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"thread {names.get(ident, ident)}:\n{_stack(frame)}" for ident, frame in sys._current_frames().items()]
    text = "\n".join([*parts, *_tasks()])
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}\n[…]"


def _stack(frame: FrameType) -> str:
    lines = traceback.format_list(traceback.extract_stack(frame)[-_MOST_FRAMES:])
    return "".join(lines).rstrip()


def _tasks() -> list[str]:
    """Where the tasks of this thread's event loop wait, the most frequent places first."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no loop runs here
        return []
    places = Counter(" > ".join(_awaits(task.get_coro())) for task in tasks if task is not asyncio.current_task())
    lines = [f"  {count} x {place}" for place, count in places.most_common(_MOST_TASKS)]
    return ["tasks:", *lines] if lines else []


def _awaits(awaited: Any) -> Iterator[str]:
    """A coroutine and what it awaits, down to what is no coroutine."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is None:
            return
        yield f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None) or getattr(awaited, "ag_await", None)


def innermost_files() -> list[str]:
    """The source file of the innermost call of each thread of this process."""
    return [frame.f_code.co_filename for frame in sys._current_frames().values()]


# ---- of another process


def allow_dumps() -> None:
    """Lets others on this machine see this process's stacks from now on, by SIGUSR2. Repeating it changes nothing."""
    if _memory_of(os.getpid()) is None:
        faulthandler.register(signal.SIGUSR2, file=os.memfd_create(_MEMORY), all_threads=True)


def _memory_of(pid: int) -> Path | None:
    """Where a process writes its stacks; None if it does not, or is another user's."""
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if _MEMORY in os.readlink(descriptor):
                    return descriptor
    return None


def state_of(pid: int) -> str:
    """What the kernel says of a process: `is stopped (SIGSTOP) …`, `is sleeping`, …"""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "has ended"
    letter = status.rpartition(")")[2].split()[0]
    return _STATES.get(letter, f"is in state {letter}")


def dumped(pid: int, wait_s: float = 1.0) -> str | None:
    """The Python stacks of another process, as its signal handler writes them, innermost call first; None if it writes none in time."""
    memory = _memory_of(pid)
    if memory is None:
        return None
    try:
        begin = size = memory.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            time.sleep(_SETTLED_S)
            before, size = size, memory.stat().st_size
            if begin < before == size:
                break
        with memory.open("rb") as file:
            file.seek(begin)
            text = file.read(_MOST_CHARS).decode("utf-8", "replace").strip()
    except OSError:  # it has ended
        return None
    return text or None


def described(pid: int) -> str:
    """All that can be seen of a process on this machine from outside."""
    state = state_of(pid)
    text = f"its process ({pid}) {state}"
    found = dumped(pid) if state in (_STATES["R"], _STATES["S"]) else None  # no other would do anything
    return text if found is None else f"{text}\n{found}"


def machine() -> str:
    """The same for two processes that see each other under their numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


# ---- kept


def write_stacks(directory: Path, report: str, reason: str) -> Path:
    """Writes a report as `stacks-TIME-REASON.txt`, and removes the oldest of more than `_MOST_FILES`. Raises `OSError`."""
    directory.mkdir(parents=True, exist_ok=True)
    at = datetime.now()
    slug = re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-")[:40]
    path = directory / f"stacks-{at:%Y%m%d-%H%M%S}-{at.microsecond // 1000:03d}-{slug}.txt"
    path.write_text(f"{reason}, {at.astimezone():%Y-%m-%d %H:%M:%S %z}\n\n{report}\n", encoding="utf-8")
    for old in sorted(directory.glob("stacks-*.txt"))[:-_MOST_FILES]:
        old.unlink(missing_ok=True)
    return path
