"""What a run needs of the machine itself: processors, memory, disks, limits, clock. Reads files of the system; writes one for a moment."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from verst.doctor.findings import Finding

_MIB, _GIB = 1 << 20, 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
_SHARED = Path("/dev/shm")
_MEASURED_S = 1.0
"""Limit of measuring the disk."""
_SLOW_DISK_MIB_S = 50.0
_SLOW_SYNC_S = 0.05
_MEMLOCK_BYTES = 64 * _MIB
_CLOCK_S = 0.1
_JUMP_S = 0.01
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def machine_findings(*, gpu: bool) -> Iterator[Finding]:
    yield _processors()
    yield _memory()
    free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0
    size = f" of {shutil.disk_usage(_SHARED).total / _GIB:.1f} GiB" if _SHARED.is_dir() else ""
    advice = "published weights lie there twice, with Ray's objects: enlarge it (docker run --shm-size=16g), or set weights.location"
    yield room("/dev/shm", free, 2 * _GIB, advice, size)
    here = Path.cwd()
    advice = "a checkpoint takes 12 bytes for each parameter, checkpoint.keep of them are kept: set run.dir to a larger disk"
    yield room(f"disk of {here}", shutil.disk_usage(here).free, 10 * _GIB, advice)
    yield disk_speed(here)
    yield _open_files()
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], needed=gpu or any(Path("/sys/class/infiniband").glob("*")))
    yield _clock()


def _processors() -> Finding:
    allowed = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    found = f"{allowed}" if quota is None or quota >= allowed else f"{allowed}, limited to the time of {quota:g}"
    few = min(allowed, quota or allowed) < 2
    advice = "loop, engine and trainer share one processor: give the machine or container two or more"
    return Finding("CPUs", found, "", "low" if few else "ok", advice if few else "")


def _cpu_quota() -> float | None:
    """Processors that the container may use in time, by cgroup 2; None without a limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with suppress(OSError, StopIteration, ValueError):  # counts what the kernel would give back, unlike free pages
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        total, available = min(total, limit), min(available, max(limit - used, 0))
    advice = (
        "Ray ends workers where memory runs out: end other programs, or use a smaller model, rollout.max_running or train.microbatch_tokens"
    )
    return room("memory", available, 4 * _GIB, advice, f" of {total / _GIB:.1f} GiB")


def room(what: str, free: int, enough: int, advice: str, of: str = "") -> Finding:
    """A finding about bytes that are free; `of` says of how many."""
    few = free < enough
    return Finding(what, f"{free / _GIB:.1f} GiB free{of}", "", "low" if few else "ok", advice if few else "")


def disk_speed(directory: Path) -> Finding:
    """Writes up to 64 MiB with one fsync, then small records with one each, for a second at most."""
    what = "disk speed"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            rate, sync_s = _measured(file.fileno())
    except OSError as error:
        advice = f"run.dir must be on a disk that can be written: {directory} cannot"
        return Finding(what, f"not measured: {error.strerror}", "", "low", advice)
    slow = rate < _SLOW_DISK_MIB_S or sync_s > _SLOW_SYNC_S
    advice = "every step waits for two fsyncs of its journal, and checkpoints are written here: set run.dir to a local disk"
    found = f"{rate:.0f} MiB/s written, fsync {1e3 * sync_s:.1f} ms"
    return Finding(what, found, "", "low" if slow else "ok", advice if slow else "")


def _measured(file: int) -> tuple[float, float]:
    """MiB/s, and the median seconds of an fsync after a small write."""
    block, written, began = os.urandom(4 * _MIB), 0, time.perf_counter()
    while written < 64 * _MIB and time.perf_counter() - began < _MEASURED_S / 2:
        written += os.write(file, block)
    os.fsync(file)
    rate = written / _MIB / (time.perf_counter() - began)
    times = []
    while len(times) < 10 and (not times or sum(times) < _MEASURED_S / 2):
        begun = time.perf_counter()
        os.write(file, block[:4096])
        os.fsync(file)
        times.append(time.perf_counter() - begun)
    return rate, sorted(times)[len(times) // 2]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 4096 or soft == resource.RLIM_INFINITY
    advice = "ulimit -n 65536" + ("" if hard == resource.RLIM_INFINITY or hard >= 65536 else f" (the hard limit is {hard}: limits.conf)")
    found = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Finding("open files", found, "", "ok" if enough else "low", "" if enough else advice)


def locked_memory(limit: int, *, needed: bool) -> Finding:
    """`needed`: there are devices that read memory by themselves."""
    enough = limit == resource.RLIM_INFINITY or limit >= _MEMLOCK_BYTES or not needed
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / _MIB:.0f} MiB"
    advice = "RDMA registers the memory it sends: ulimit -l unlimited (docker run --ulimit memlock=-1)"
    return Finding("locked memory", found, "", "ok" if enough else "low", "" if enough else advice)


def _clock() -> Finding:
    """Deadlines go by the monotonic clock; the wall clock only dates lines: a wrong one misleads who reads logs of several machines."""
    before = time.time() - time.monotonic()
    time.sleep(_CLOCK_S)
    jump_s = abs(time.time() - time.monotonic() - before)
    state, error_s = kernel_clock()
    synchronised = {None: "synchronisation unknown", True: f"synchronised to {1e3 * error_s:.0f} ms", False: "not synchronised"}[state]
    steady = jump_s < _JUMP_S
    found = f"{synchronised}, {'steady' if steady else f'jumped by {1e3 * jump_s:.0f} ms'} against the monotonic clock"
    if not steady:
        return Finding("clock", found, "", "low", "something sets the wall clock by steps: use chrony or systemd-timesyncd, which slew it")
    advice = "logs of several machines cannot be compared: run chrony or systemd-timesyncd (in a container: on its host)"
    return Finding("clock", found, "", "low" if state is False else "ok", advice if state is False else "")


def kernel_clock() -> tuple[bool | None, float]:
    """Whether the kernel holds its clock for synchronised (None: it does not say), and its largest error in seconds. By adjtimex(2)."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: a question that changes nothing
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None, 0.0
    if state < 0:
        return None, 0.0
    error_us = int.from_bytes(buffer.raw[24:32], "little", signed=True)  # maxerror: the fourth long of 64-bit systems
    return state != _UNSYNCHRONISED, error_us / 1e6
