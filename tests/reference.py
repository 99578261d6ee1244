"""`docs/metrics.md` as data: the names that it explains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
NOT_METRICS = {"kind", "step", "failures"}


@cache
def documented() -> tuple[str, ...]:
    """The names in the first column of its tables; `*` stands for any ending."""
    first = [line.split(" | ")[0] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return tuple(name for cell in first for name in re.findall(r"`([^`]+)`", cell))


def undocumented(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names in these rows that it does not explain."""
    names = {name for row in rows for name in row} - NOT_METRICS
    return {name for name in names if not any(fnmatchcase(name, known) for known in documented())}
