"""The live view: what it shows of which rows, at which width, and how it leaves a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from verst.config.load import load_config
from verst.observe.live import Frame, duration, eta_s, picture, sparkline
from verst.observe.screen import Screen
from verst.observe.terminal import is_step_line, step_line
from verst.runtime.rundir import RunDirectory

ENTER, LEAVE, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def row(step: int, **metrics: Any) -> dict[str, Any]:
    return {"kind": "step", "step": step, "version": step, "reward": step / 10, "time/step_s": 2.0, "time/rollout_s": 1.5} | metrics


def text(frame: Frame, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(picture(frame, width, height))
    return captured.get().splitlines()


FULL = [
    {"kind": "evaluation", "step": 0, "eval/reward": 0.125},
    *(
        row(s, **{"mismatch/k3": 2e-13, "tokens_per_s": 1234.0, "checkpoint/step": 2.0, "time/publish_s": 0.3, "routes/differ": 0.015})
        for s in range(1, 6)
    ),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_width_shows_the_figures_and_no_line_is_wider(width: int):
    lines = text(Frame("night", 20, FULL, ["a note"]), width)
    shown = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for found in ("night", "step 5/20", "25%", "0.500", "0.125", "2.0e-13", "1,234", "1.5%", "30 s left", "a note"):
        assert found in shown, found
    assert ("╮╭" in shown) == (width >= 80)  # panels side by side where there is room


def test_bars_are_the_mean_shares_of_the_newest_steps():
    old = [row(s, **{"time/rollout_s": 0.0}) for s in range(1, 30)]
    new = [row(s, **{"time/pull_wait_s": 0.3}) for s in range(30, 50)]
    shown = "\n".join(text(Frame("r", 50, old + new), 120))
    assert "mean of 20 steps" in shown
    for phase in ("rollout", "pull", "other"):
        assert phase in shown
    assert " 75% " in shown  # 1.5 of 2 s
    assert " 15% " in shown
    assert " 10% " in shown  # what no phase covers


def test_a_missing_metric_is_left_out_and_one_that_is_not_finite_is_told():
    shown = "\n".join(text(Frame("r", 9, [row(1), row(2, **{"mismatch/k3": None, "update/grad_norm": math.nan})]), 80))
    assert "routes differ" not in shown
    assert "eval" not in shown
    assert shown.count("not finite") == 2  # null, which is what metrics.jsonl has, and NaN
    assert "staleness" not in shown


@pytest.mark.parametrize("rows", [[], [{"kind": "evaluation", "step": 0, "eval/reward": 0.5}], [{"kind": "step", "step": 1}]])
def test_a_run_of_which_little_is_known_can_be_shown(rows: list[dict[str, Any]]):
    lines = text(Frame("r", 3, rows), 80)
    assert f"step {1 if rows and rows[0]['kind'] == 'step' else 0}/3" in lines[0]
    assert any("no step yet" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_bottleneck_is_named_at_the_top(width: int):
    idle = {"idle/trainer": 0.41, "idle/replicas": 0.02, "wait/generation": 0.38, "wait/loop": 0.03}
    lines = text(Frame("r", 9, [row(1, **idle), row(2, **idle)], ["a note"]), width, 24)
    said = "bottleneck: generation (trainer idle 41%, replicas idle 2%)"
    assert lines[3].rstrip() == (said if width >= len(said) else said[: width - 1] + "…")
    assert "bottleneck" not in "\n".join(text(Frame("r", 9, [row(1)]), width))  # of a run that has no idle shares


def test_failures_are_counted_by_reason_over_the_steps():
    rows = [row(1, failures={"a [bold]b": 2, "c": 1}), row(2), row(3, failures={"a [bold]b": 3}, **{"groups/dropped": 1.0})]
    shown = "\n".join(text(Frame("r", 9, rows), 80))
    assert "5  a [bold]b" in shown  # what a user's function says is no markup
    assert "1  c" in shown
    assert "1  groups dropped" in shown
    assert "failed trajectories" not in "\n".join(text(Frame("r", 9, [row(1)]), 80))


@pytest.mark.parametrize("height", [10, 20, 24, 30, 60])
def test_what_was_told_is_cut_so_that_the_rest_fits(height: int):
    told = [f"note {i}" for i in range(100)]
    lines = text(Frame("r", 9, FULL, told), 80, height)
    alone = len(text(Frame("r", 9, FULL), 80))
    assert len(lines) <= max(height, alone)
    assert ("note 99" in "\n".join(lines)) == (height > alone + 2)  # the newest


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([5.0, 5.0, 5.0], 8, "▁▁▁"),
        ([0.1 + 0.2, 0.3], 8, "▁▁"),
        ([0, None, 7], 8, "▁×█"),
        ([0, 0, math.nan, 7], 2, "▁×"),
        ([-math.inf], 8, "×"),
        ([], 8, ""),
    ],
)
def test_sparklines(values: list[float | None], width: int, drawn: str):
    assert sparkline(values, width) == drawn


def test_the_time_left_is_that_of_the_newest_steps():
    slow_start = [row(1, **{"time/step_s": 1000.0}), *(row(s) for s in range(2, 30))]
    assert eta_s(Frame("r", 39, slow_start)) == 20
    assert eta_s(Frame("r", 39, [])) is None
    assert [duration(s) for s in (45, 12 * 60, 185 * 60, 52 * 3600)] == ["45 s", "12 min", "3 h 05 min", "2 d 4 h"]


def test_a_step_line_is_told_from_others():
    assert is_step_line(step_line(3, 40, {"time/step_s": 1.0, "reward": 0.5}))
    assert not is_step_line("step 3 was trained again from the journal")


def screen_on(tmp_path: Path, output: io.StringIO) -> Screen:
    console = Console(file=output, force_terminal=True, width=80, height=24, color_system=None)
    return Screen("night", 20, tmp_path / "metrics.jsonl", console)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("a defect")])
def test_the_terminal_is_given_back_and_the_last_lines_stay(tmp_path: Path, error: BaseException | None):
    output = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt, ValueError), screen_on(tmp_path, output) as view:
        view.tell("warning: the disk is [bold]nearly[/bold] full")
        view.tell(step_line(1, 20, {"time/step_s": 1.0}))
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row(7)) + "\n" + '{"kind": "st')  # one line is still being written
        if error is not None:
            raise error
    before, _, after = output.getvalue().rpartition(LEAVE)
    assert ENTER in before
    assert CURSOR in output.getvalue()[output.getvalue().rindex(ENTER) :]
    assert "step 7/20" in after
    assert after.endswith("warning: the disk is [bold]nearly[/bold] full\n")
    assert "step  1/20" not in after


_VIEWER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it, and so would this
from verst.observe import screen
assert screen.is_possible()
with screen.Screen("night", 20, Path(sys.argv[1])) as view:
    view.tell("a warning")
    time.sleep(30)
"""
_VERST = "import sys; from verst.cli import main; sys.exit(main())"


@contextlib.contextmanager
def on_a_terminal(*command: str, rows: int = 24, columns: int = 80) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A Python process on a terminal of this size, and the terminal's other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    command = (sys.executable, *command)
    viewer = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    try:
        yield viewer, ours
    finally:
        viewer.kill()
        viewer.wait()
        os.close(ours)


def read_until(terminal: int, wanted: str | None, deadline_s: float = 20) -> str:
    """What comes out until `wanted` is in it; until the end, if None."""
    seen, end = b"", time.monotonic() + deadline_s
    while time.monotonic() < end:
        if wanted is not None and wanted in seen.decode(errors="replace"):
            return seen.decode(errors="replace")
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                new = os.read(terminal, 1 << 16)
            except OSError:  # its last process has closed it
                break
            seen += new
    assert wanted is None, f"{wanted!r} did not come; the end of what did: {seen[-400:]!r}"
    return seen.decode(errors="replace")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_and_a_resize_leave_the_terminal_intact(tmp_path: Path, number: signal.Signals, code: int):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row(s)) + "\n" for s in range(1, 6)))
    with on_a_terminal("-c", _VIEWER, str(metrics)) as (viewer, terminal):
        first = read_until(terminal, "step 5/20")
        assert first.index(ENTER) < first.index("step 5/20")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 50, 0, 0))
        with metrics.open("a") as file:
            file.write(json.dumps(row(6)) + "\n")
        again = read_until(terminal, "step 6/20")
        read_until(terminal, "╰" + "─" * 48 + "╯")  # a panel over the whole of the new width
        assert "step 6/20" in again
        viewer.send_signal(number)
        rest = read_until(terminal, None)
        assert viewer.wait(10) == code
    assert LEAVE in rest
    assert CURSOR in rest
    assert "step 6/20" in rest[rest.index(LEAVE) :]
    assert "a warning" in rest[rest.index(LEAVE) :]


@pytest.mark.parametrize("plain", [False, True])
def test_watching_a_run_from_another_terminal(tmp_path: Path, plain: bool):
    config = load_config({"run": {"name": "night", "dir": str(tmp_path), "steps": 20}, "model": {"path": "m"}})
    run = RunDirectory.create(config, None, {})
    run.metrics.write_text("".join(json.dumps(row(s)) + "\n" for s in range(1, 6)))
    run.log.write_text("a warning\n")
    with on_a_terminal("-c", _VERST, "watch", str(run.root), *(["--plain"] if plain else [])) as (viewer, terminal):
        seen = read_until(terminal, None)
        assert viewer.wait(10) == 0
    assert "step 5 of 20 is the last one told" in seen[seen.index("a warning") :]
    assert (ENTER in seen, LEAVE in seen, "where the time goes" in seen) == (not plain,) * 3


@pytest.mark.parametrize(("term", "terminal", "possible"), [("xterm", True, True), ("dumb", True, False), ("xterm", False, False)])
def test_the_view_is_for_terminals(monkeypatch: pytest.MonkeyPatch, term: str, terminal: bool, possible: bool):
    from verst.observe import screen

    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert screen.is_possible() is possible
