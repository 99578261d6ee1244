"""Verst: reinforcement learning post-training for language models, from a laptop to a cluster.

`import verst` costs nothing: everything loads on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verst.config.load import load_config as load_config
    from verst.runtime.launch import RunResult as RunResult
    from verst.runtime.launch import resume as resume
    from verst.runtime.launch import train as train
    from verst.runtime.replay import replay as replay
    from verst.runtime.replayed import Replayed as Replayed

__version__ = "0.1.0"

_WHERE = {
    "train": "verst.runtime.launch",
    "resume": "verst.runtime.launch",
    "RunResult": "verst.runtime.launch",
    "replay": "verst.runtime.replay",
    "Replayed": "verst.runtime.replayed",
    "load_config": "verst.config.load",
}


def __getattr__(name: str) -> Any:
    """Loads the public names on first use (PEP 562), so that `import verst` pulls neither torch nor Ray."""
    if name not in _WHERE:
        raise AttributeError(f"module 'verst' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*_WHERE, "__version__"]
