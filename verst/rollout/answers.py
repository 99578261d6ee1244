"""Where a run's answers lie on this machine, which code that a model wrote must not find."""

from __future__ import annotations

import os

from verst.config.schema import Config

_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
"""Where data sets of the hub lie if not in the home directory."""


def answer_paths(config: Config) -> list[str]:
    """Files and directories with the prompts' fields: what `data` and `eval.sets` name, caches of data sets, and the runs, whose journals
    have them. Not all need to be here.
    """
    sources = [config.data, *config.eval.sets.values()]
    named = [place for source in sources for place in (source.path, source.dataset) if place is not None]
    caches = [os.environ[name] for name in _CACHES if name in os.environ]
    return [os.path.abspath(os.path.expanduser(place)) for place in (*named, config.run.dir, *caches)]
