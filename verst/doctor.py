"""`verst doctor`: this machine against the version sets that the suites passed on, and against what a run needs of it.

Reads package metadata and files of the system; imports none of the packages it looks for.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_MATRIX = Path(__file__).with_name("matrix.toml")
_PURPOSE = {"core": "", "sglang": "rollout.engine sglang", "megatron": "train.backend megatron"}
_DRIVER = Path("/proc/driver/nvidia/version")
_COMMAND_S = 4.0
_GIB = 1 << 30
_CACHES = ("~/.cache/flashinfer", "~/.cache/tvm-ffi", "~/.triton")
"""Where SGLang's kernels lie once they are compiled."""


@dataclass(frozen=True, slots=True)
class VersionSet:
    """One entry of `verst/matrix.toml`. `packages` and `install` are by what needs them: core, sglang, megatron."""

    name: str
    gpu: bool
    python: str
    passed: str
    install: Mapping[str, str]
    packages: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: what was looked at, what is there, what was tested, and what to do if it is not right.

    `verdict`: "ok", "other" (works perhaps, was not tested), "absent" (needed only for some run files), "low" or "LACKING".
    """

    what: str
    found: str
    tested: str
    verdict: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """All rows about a machine."""

    nearest: VersionSet
    findings: Sequence[Finding]

    @property
    def lacking(self) -> list[Finding]:
        """Those without which nothing runs."""
        return [finding for finding in self.findings if finding.verdict == "LACKING"]

    def lines(self) -> list[str]:
        """The table, then what to do."""
        rows = [("", "found", "tested", ""), *((f.what, f.found, f.tested, f.verdict) for f in self.findings)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        advice = list(dict.fromkeys(f"{f.what}: {f.advice}" for f in self.findings if f.advice))
        about = f"compared with the set {self.nearest.name}, on which passed: {self.nearest.passed}"
        return [about, *table, *(["to do:", *(f"  {line}" for line in advice)] if advice else ["nothing to do"])]


def version_sets() -> list[VersionSet]:
    """The tested matrix."""
    sets = tomllib.loads(_MATRIX.read_text(encoding="utf-8"))["set"]
    return [
        VersionSet(s["name"], s["gpu"], s["python"], s["passed"], s["install"], {group: s[group] for group in _PURPOSE if group in s})
        for s in sets
    ]


def examine() -> Examination:
    """Looks at this machine. Takes well under five seconds, also where a command hangs."""
    gpus, driver_cuda = _gpus()
    nearest = _nearest([s for s in version_sets() if s.gpu == bool(gpus)])
    findings = [_python(nearest), *_packages(nearest), *_gpu_findings(gpus, driver_cuda)]
    return Examination(nearest, [*findings, *_machine(), *_network(bool(gpus))])


def _nearest(sets: Sequence[VersionSet]) -> VersionSet:
    """The set with most of its versions found here."""
    return max(sets, key=lambda s: sum(_installed(name) == tested for group in s.packages.values() for name, tested in group.items()))


def _installed(package: str) -> str | None:
    try:
        return version(package).split("+")[0]  # a local label such as +cu130 is no other version
    except PackageNotFoundError:
        return None


def _python(nearest: VersionSet) -> Finding:
    found = platform.python_version()
    same = found.startswith(f"{nearest.python}.")
    return Finding("python", found, nearest.python, "ok" if same else "other")


def _packages(nearest: VersionSet) -> Iterator[Finding]:
    for group, packages in nearest.packages.items():
        for package, tested in packages.items():
            found = _installed(package)
            if found is not None and tested in (found, ""):
                yield Finding(package, found, tested, "ok")
            elif found is not None:
                yield Finding(package, found, tested, "other", f"not tested with {found}; the tested one: pip install {package}=={tested}")
            elif group == "core":
                yield Finding(package, "-", tested, "LACKING", nearest.install[group])
            else:
                yield Finding(package, "-", tested, "absent", f"only for {_PURPOSE[group]}: {nearest.install[group]}")


def _gpus() -> tuple[list[tuple[str, int, str]], str]:
    """Name, memory in bytes and driver of each GPU, and the newest CUDA that the driver serves ("" if unknown)."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    with ThreadPoolExecutor(2) as both:  # each may take seconds where the driver has to be woken up
        listed, summary = both.map(_said, (query, ("nvidia-smi",)))
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    gpus = [(row[0], int(row[1]) << 20, row[2]) for row in rows if len(row) == 3 and row[1].isdecimal()]
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", summary)
    return gpus, cuda[1] if cuda else ""


def _said(command: Sequence[str]) -> str:
    """What a command prints; nothing if there is none, or it fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu_findings(gpus: Sequence[tuple[str, int, str]], driver_cuda: str) -> Iterator[Finding]:
    if not gpus and _DRIVER.exists():
        yield Finding("GPUs", "a driver, but none listed", "", "low", f"nvidia-smi failed or took longer than {_COMMAND_S:g} s: run it")
    elif not gpus:
        yield Finding("GPUs", "none", "", "ok")
    if not gpus:
        return
    name, nbytes, driver = gpus[0]
    yield Finding("GPUs", f"{len(gpus)} x {name}, {nbytes / _GIB:.0f} GiB", "", "ok")
    built = _torch_cuda()
    too_old = built and driver_cuda and _numbers(driver_cuda) < _numbers(built)
    if built == "":
        verdict = "LACKING"
        advice = "torch is built without CUDA: install one that is built for it (docs/install-gpu.md has the commands)"
    elif too_old:
        verdict, advice = "LACKING", f"torch needs CUDA {built}: install a driver that serves it, or a torch for CUDA {driver_cuda}"
    else:
        verdict, advice = "ok", ""
    of_torch = "not installed" if built is None else built or "none"
    yield Finding("CUDA", f"driver {driver} (CUDA {driver_cuda or '?'}), torch's: {of_torch}", "", verdict, advice)
    if _installed("sglang"):
        yield from _kernels()


def _kernels() -> Iterator[Finding]:
    nvcc = shutil.which("nvcc") or (os.path.exists("/usr/local/cuda/bin/nvcc") and "/usr/local/cuda/bin/nvcc")
    advice = "" if nvcc else "SGLang's kernels are compiled on the first start: install the CUDA toolkit of torch's CUDA, and set CUDA_HOME"
    yield Finding("nvcc", nvcc or "none", "", "ok" if nvcc else "low", advice)
    warm = [path for path in _CACHES if Path(path).expanduser().is_dir()]
    yield Finding("compiled kernels", ", ".join(warm) or "none: the first start of SGLang takes about two minutes", "", "ok")


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, read from its file; "" for none, None if torch is not installed."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    about = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", about, re.MULTILINE)
    return found[1] if found else ""


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def _machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("CPUs, memory", f"{len(os.sched_getaffinity(0))}, {memory / _GIB:.0f} GiB", "", "ok")
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    advice = "published weights lie there twice, with Ray's objects: enlarge it (docker run --shm-size=16g), or set weights.location"
    yield _room("/dev/shm", free, 2 * _GIB, advice)
    advice = "a checkpoint takes 12 bytes for each parameter, checkpoint.keep of them are kept: set run.dir to a larger disk"
    yield _room(f"disk of {Path.cwd()}", shutil.disk_usage(Path.cwd()).free, 10 * _GIB, advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    verdict, advice = ("ok", "") if files >= 4096 or files == resource.RLIM_INFINITY else ("low", "ulimit -n 65536")
    yield Finding("open files", "unlimited" if files == resource.RLIM_INFINITY else str(files), "", verdict, advice)


def _room(what: str, free: int, enough: int, advice: str) -> Finding:
    few = free < enough
    return Finding(what, f"{free / _GIB:.1f} GiB free", "", "low" if few else "ok", advice if few else "")


def _network(gpu: bool) -> Iterator[Finding]:
    """The loopback, on which SGLang's servers listen and nobody else's requests arrive; RDMA devices."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=1).close()
    except OSError as error:
        yield Finding("loopback", str(error), "", "LACKING", "processes of one machine talk by 127.0.0.1: allow it (ip link set lo up)")
    else:
        yield Finding("loopback", "127.0.0.1 (Ray, gloo, SGLang's servers)", "", "ok")
    if gpu:
        devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
        yield Finding("RDMA devices", ", ".join(devices) or "none: NCCL uses TCP between machines", "", "ok")
