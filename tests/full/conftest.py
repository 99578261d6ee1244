"""The table of what was learned, at the end of the output."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest

LEARNED: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
"""For each algorithm and seed: the first step whose evaluation was at the target, the seconds until then, and the last evaluation."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not LEARNED:
        return
    terminalreporter.section("learned")
    terminalreporter.write_line("| Algorithm | Steps to the target | Seconds | Reward at the end |")
    terminalreporter.write_line("|---|---|---|---|")
    for name, runs in LEARNED.items():
        steps, seconds, last = zip(*runs, strict=True)
        cells = (", ".join(map(str, steps)), f"{median(seconds):.0f}", ", ".join(f"{value:.3f}" for value in last))
        terminalreporter.write_line(f"| `{name}` | {' | '.join(cells)} |")
