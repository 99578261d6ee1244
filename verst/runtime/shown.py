"""How a run is shown to the one who started it, took it up or looks at it: line by line, or as a live view.

The lines come from the caller. The view's figures come from the run's metrics.jsonl, wherever the run lives: whoever shows a run sees its
directory, which is on a shared disk if the run is on a cluster. So there is one way to watch, and it costs the run nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from verst.runtime.rundir import RunDirectory

Echo = Callable[[str], None]


@contextlib.contextmanager
def shown(run: RunDirectory, steps: int, echo: Echo, *, live: bool) -> Iterator[Echo]:
    """What to tell each line to. `live`: to a live view, if standard output is a terminal that can show one; else to `echo`."""
    if live:
        from verst.observe import screen

        if screen.is_possible():
            with screen.Screen(run.root.name, steps, run.metrics) as view:
                yield view.tell
            return
    yield echo
