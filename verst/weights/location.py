"""Where published weights lie. Imports no torch, so that the loop can look after the directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_SUFFIX = ".weights"


def publish_directory(run_id: str, location: str | None) -> Path:
    """Where a run's published weights go: a directory of its own below `weights.location`, or in shared memory."""
    if location is not None:
        return Path(location) / f"verst-{run_id}"
    shared = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return shared / f"verst-{run_id}"


def version_file(directory: str | Path, version: int) -> Path:
    """The file of one version."""
    return Path(directory) / f"{version:08d}{_SUFFIX}"


def remove_versions(directory: str | Path, keep: Collection[int]) -> None:
    """Removes all published versions but these. Engines that still read a removed one can finish: its memory is freed after them."""
    kept = {version_file(directory, version) for version in keep}
    for path in Path(directory).glob(f"*{_SUFFIX}"):
        if path not in kept:
            path.unlink(missing_ok=True)


def remove_directory(directory: str | Path) -> None:
    """Frees everything a run has published. For its end, and for its start after a crash."""
    shutil.rmtree(directory, ignore_errors=True)
