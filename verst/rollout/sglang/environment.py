"""The environment that SGLang's processes get."""

from __future__ import annotations

import os
from pathlib import Path

from verst.rollout.sglang.cpu import environment, python_path

INSTALL = "Install it with `make stack` on a machine without a GPU, with `pip install 'verst[sglang]'` on one with"
MARKER = "VERST_SGLANG_SERVER"
"""Variable that all processes of one server share, and none of another."""


def server_environment(device: str, marker: str = "", ranks: int = 1) -> dict[str, str]:
    """This process's environment with what SGLang needs on this device ("cpu" or "cuda") for so many tensor-parallel ranks."""
    root = str(Path(__file__).parents[3])  # where `verst` is imported from, also when it is not installed
    paths = [*(python_path() if device == "cpu" else []), root, os.environ.get("PYTHONPATH", "")]
    own = environment(ranks) if device == "cpu" else {}
    return {
        **os.environ,
        **own,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",  # else each look at the health generates a token and waits a second
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for the margin that SGLang keeps
        MARKER: marker,
    }
