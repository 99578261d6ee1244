"""The live view: metric rows in, one picture out. Nothing here reads, waits or knows what a terminal is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from verst.observe.idle import bottleneck_of
from verst.observe.terminal import phases, set_rewards, written

Row = Mapping[str, Any]

_TWO_COLUMNS = 80
"""Characters of width from which panels stand side by side."""
_PACE_STEPS = 20
"""The newest steps, over which times and the time that is left are averaged."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "×"
_LEARNING = (
    ("reward", "reward"),
    ("eval", "eval/reward"),
    ("loss", "loss/total"),
    ("kl", "policy/kl"),
    ("entropy", "policy/entropy"),
    ("grad norm", "update/grad_norm"),
    ("lr", "update/lr"),
)
_FIDELITY = (
    ("k3", "mismatch/k3"),
    ("k3 stale", "stale_mismatch/k3"),
    ("abs max", "mismatch/abs_max"),
    ("routes differ", "routes/differ"),
    ("probe", "mismatch/probe"),
    ("staleness", "staleness/max"),
)
_PACE = (
    ("tokens/s", "tokens_per_s"),
    ("s a step", "time/step_s"),
    ("tokens each", "rollout/generated_tokens"),
    ("length bias", "bias/length"),
    ("truncated", "rollout/truncated"),
    ("failed", "rollout/failed"),
)


@dataclass(frozen=True)
class Frame:
    """What one picture shows of a run, at one moment."""

    name: str
    steps: int
    """That the run is to make."""
    rows: Sequence[Row]
    """Step and evaluation rows in order, the newest last; `verst.observe.sinks.RowTail`."""
    lines: Sequence[str] = ()
    """What the run told, the newest last."""
    silent_s: float | None = None
    """Seconds since the last row came; None: unknown."""

    @property
    def step_rows(self) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == "step"]


def picture(frame: Frame, width: int, height: int | None = None) -> RenderableType:
    """The view at `width` characters. `height`: lines that there are; what the run told is cut so that the rest fits. None: all of it.

    A metric that no row has is left out. One that is not finite (null in the file) is shown as such: it is news, not absence.
    """
    if width >= _TWO_COLUMNS:
        left_width, right_width = width // 2, width - width // 2
    else:
        left_width = right_width = width
    left = _metric_panels(frame.rows, left_width)
    right = [_time_panel(frame.step_rows, right_width), *_pace_panels(frame.rows, right_width)]
    parts: list[_Box] = [_header(frame, width)]
    if width >= _TWO_COLUMNS:
        parts.append(_side_by_side(left, right))
    else:
        parts += [*left, *right]
    parts += _failure_boxes(frame.step_rows)
    used = sum(part.height for part in parts)
    room = len(frame.lines) if height is None else max(0, height - used - 2)
    if frame.lines and room:
        parts.append(_panel("what the run told", [Text(line, no_wrap=True, overflow="ellipsis") for line in frame.lines[-room:]]))
    return Group(*(part.content for part in parts))


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The course of a metric in at most `width` characters; neighbours share one if there are more values, which then shows their mean.

    None, NaN and infinities are `×`: a character that stands for any of them is one.
    """
    count = min(width, len(values))
    cells = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [_mean(cell) for cell in cells]
    known = [m for m in means if m is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0  # a mean of equal numbers differs in its last bits
    return "".join(_NOT_FINITE if m is None else _BLOCKS[int((m - low) / span * (len(_BLOCKS) - 1) + 0.5) if span else 0] for m in means)


def eta_s(frame: Frame) -> float | None:
    """Seconds that are left at the pace of the newest steps; None before the first."""
    steps = frame.step_rows
    pace = _mean([row["time/step_s"] for row in steps[-_PACE_STEPS:] if row.get("time/step_s") is not None])
    return None if pace is None else (frame.steps - int(steps[-1]["step"])) * pace


@dataclass(frozen=True)
class _Box:
    """Something to show, and how many lines it takes."""

    content: RenderableType
    height: int


def _header(frame: Frame, width: int) -> _Box:
    steps = frame.step_rows
    step = int(steps[-1]["step"]) if steps else 0
    facts = [f"step {step}/{frame.steps}", f"{step / frame.steps:.0%}"]
    left = eta_s(frame)
    if left is not None and step < frame.steps:
        facts.append(f"{duration(left)} left")
    title = Table.grid(expand=True, padding=(0, 1))
    title.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    title.add_column(no_wrap=True, justify="right")
    title.add_row(Text.assemble(("verst ", "bold cyan"), (frame.name, "bold")), Text(" · ".join(facts)))
    bar = Table.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=frame.steps, completed=step, width=width, complete_style="cyan", finished_style="green"))
    lines = [Text(" · ".join(_standing(frame)), style="dim", no_wrap=True, overflow="ellipsis")]
    bottleneck = bottleneck_of(steps)
    if bottleneck is not None:
        lines.append(Text(str(bottleneck), no_wrap=True, overflow="ellipsis"))
    return _Box(Group(title, bar, *lines), 2 + len(lines))


def _standing(frame: Frame) -> list[str]:
    """Where the run stands beside its figures: the version, its checkpoints, how long nothing came."""
    if not frame.step_rows:
        return ["no step yet"]
    last = frame.step_rows[-1]
    facts = [f"version {last['version']:.0f}"] if last.get("version") is not None else []
    if last.get("checkpoint/step") is not None:
        facts.append(f"checkpoint of step {last['checkpoint/step']:.0f}" if last["checkpoint/step"] else "no checkpoint yet")
    if last.get("checkpoint/failed"):
        facts.append(f"checkpoints failed {last['checkpoint/failed']:.0f}")
    if last.get("tracking/lost"):
        facts.append(f"reports lost {last['tracking/lost']:.0f}")
    if frame.silent_s is not None:
        facts.append(f"last step {duration(frame.silent_s)} ago")
    return facts


def _metric_panels(rows: Sequence[Row], width: int) -> list[_Box]:
    learning = [*_LEARNING[:2], *set_rewards(dict.fromkeys(name for row in rows for name in row)), *_LEARNING[2:]]
    panels = [_metrics("learning", learning, rows, width), _metrics("engine against trainer", _FIDELITY, rows, width)]
    return [panel for panel in panels if panel is not None]


def _pace_panels(rows: Sequence[Row], width: int) -> list[_Box]:
    panel = _metrics("rollout", _PACE, rows, width)
    return [panel] if panel is not None else []


def _metrics(title: str, shown: Sequence[tuple[str, str]], rows: Sequence[Row], width: int) -> _Box | None:
    """A panel with a line for each metric that some row has: its newest value and its course. None: no row has any."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, width=13, style="cyan")
    table.add_column(no_wrap=True, width=10, justify="right")
    table.add_column(no_wrap=True)
    for label, name in shown:
        values = [row[name] for row in rows if name in row]
        if values:
            table.add_row(label, _value(name, values[-1]), Text(sparkline(values, max(1, width - 4 - 13 - 10 - 3)), style="green"))
    return _Box(Panel(table, title=title, title_align="left", border_style="dim"), table.row_count + 2) if table.row_count else None


def _value(name: str, value: float | None) -> Text:
    if value is None or not math.isfinite(value):
        return Text("not finite", style="bold red")
    return Text(written(name, value), style="bold red" if value and name in ("rollout/failed", "update/skipped") else "bold")


def _time_panel(steps: Sequence[Row], width: int) -> _Box:
    """Where the time of the newest steps went, as bars whose lengths are shares of the whole step."""
    recent = steps[-_PACE_STEPS:]
    total = _mean([row["time/step_s"] for row in recent if row.get("time/step_s") is not None])
    if not total:
        return _panel("where the time goes", [Text("no step yet", style="dim")])
    seconds = Counter[str]()
    for row in recent:
        seconds.update(phases(row))
    means = {phase: s / len(recent) for phase, s in seconds.items()}
    large = {phase: s for phase, s in means.items() if s >= 0.02 * total}
    large["other"] = max(0.0, total - sum(large.values()))
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, width=10, style="cyan")
    table.add_column(no_wrap=True, width=8, justify="right")
    table.add_column(no_wrap=True, width=4, justify="right")
    table.add_column(no_wrap=True)
    length = max(1, width - 4 - 10 - 8 - 4 - 4)
    for phase, s in large.items():
        share = min(1.0, s / total)
        table.add_row(phase, f"{s:.2f} s", f"{share:.0%}", ProgressBar(total=1, completed=share, width=length, complete_style="magenta"))
    title = f"where the time goes (mean of {len(recent)} steps)" if len(recent) > 1 else "where the time goes"
    return _Box(Panel(table, title=title, title_align="left", border_style="dim"), table.row_count + 2)


def _failure_boxes(steps: Sequence[Row]) -> list[_Box]:
    """Failed trajectories by reason, over the rows that are kept; nothing if there were none."""
    reasons = Counter[str]()
    for row in steps:
        reasons.update(row.get("failures") or {})
    dropped = sum(row.get("groups/dropped") or 0 for row in steps)
    lines = [Text(f"{count:>6}  {reason}", style="red", no_wrap=True, overflow="ellipsis") for reason, count in reasons.most_common(4)]
    if len(reasons) > len(lines):
        lines.append(Text(f"        and {len(reasons) - len(lines)} other reasons", style="dim"))
    if dropped:
        lines.append(Text(f"{dropped:>6.0f}  groups dropped: too few of their trajectories were left", style="red", no_wrap=True))
    return [_panel(f"failed trajectories (of {len(steps)} steps)", lines)] if lines else []


def _panel(title: str, lines: Sequence[Text]) -> _Box:
    return _Box(Panel(Group(*lines), title=title, title_align="left", border_style="dim"), len(lines) + 2)


def _side_by_side(left: Sequence[_Box], right: Sequence[_Box]) -> _Box:
    lower = max(sum(box.height for box in left), sum(box.height for box in right))
    for column in (left, right):
        if column and isinstance(column[-1].content, Panel):  # both end on one line
            column[-1].content.height = lower - sum(box.height for box in column[:-1])
    table = Table.grid(expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(Group(*(box.content for box in left)), Group(*(box.content for box in right)))
    return _Box(table, lower)


def _mean(values: Sequence[float | None]) -> float | None:
    """None of no values, and if one of them is not finite: it must not be averaged away."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else None


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60 + 0.5)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 36 else f"{hours // 24} d {hours % 24} h"
