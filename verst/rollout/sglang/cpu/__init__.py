"""What SGLang imports and a machine without CUDA lacks. Only the server's process sees it, and only where the real package is absent."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_HERE = Path(__file__).parent
_STAND_INS = ("torchvision", "sgl_kernel")


def python_path() -> list[str]:
    """Directories for the server's PYTHONPATH: one for each package that is not installed, and one where SGLang finds our plugin."""
    absent = [str(_HERE / f"{name}_absent") for name in _STAND_INS if importlib.util.find_spec(name) is None]
    return [*absent, str(_HERE / "plugins")]


def environment(ranks: int) -> dict[str, str]:
    """Environment variables that make SGLang run on a CPU, each rank on a core of its own while there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    bound = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))} if ranks > 1 else {}
    # a PyTorch built for CUDA brings NCCL along, and SGLang would take it for several ranks also where there is no GPU
    return {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_NCCL_SO_PATH": "no NCCL on a CPU", **bound}


def arguments(cache_tokens: int) -> dict[str, object]:
    """Server arguments that need no kernel package, with room for so many tokens. Whoever starts the server may set others."""
    return {
        "max_total_tokens": cache_tokens,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,  # or its scheduler, asking for work without a pause, takes a core from the trainer
        # No bound on the cache, which `max_total_tokens` is: SGLang takes what other processes took while it loaded for its weights
        "mem_fraction_static": 0.5,
    }
