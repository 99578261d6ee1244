"""GPUs, their driver, and whether the installed torch can use them. Runs nvidia-smi; imports nothing of CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from verst.doctor.findings import Finding
from verst.doctor.packages import installed

_DRIVER = Path("/proc/driver/nvidia/version")
_COMMAND_S = 4.0
_GIB = 1 << 30
_CACHES = ("~/.cache/flashinfer", "~/.cache/tvm-ffi", "~/.triton")
"""Where SGLang's kernels lie once they are compiled."""


def list_gpus() -> tuple[list[tuple[str, int, str]], str]:
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


def gpu_findings(gpus: Sequence[tuple[str, int, str]], driver_cuda: str) -> Iterator[Finding]:
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
    if installed("sglang"):
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
