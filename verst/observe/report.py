"""The picture and the three lines at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verst.observe.terminal import set_rewards

Rows = Sequence[Mapping[str, Any]]


def summary(rows: Rows) -> list[str]:
    """Three lines: what was learned, how faithful it was, how fast it went. Over the step rows of a run."""
    steps = [r for r in rows if r["kind"] == "step"]
    if not steps:
        return ["no step was completed"]
    main = "reward" if _column(steps, "reward") else "loss/total"
    lines = [f"{len(steps)} steps: " + _change(main, _column(steps, main))]
    for name in _evaluations(rows):
        lines[0] += ", " + _change(name, _column(rows, name))
    worst = max(_column(steps, "mismatch/abs_max"), default=None)
    fidelity = f"largest mismatch {worst:.2e}" if worst is not None else "no mismatch measured (nothing was sampled)"
    for label, name, form in (("k3", "mismatch/k3", ".1e"), ("routes that differ", "routes/differ", ".2%")):
        if _column(steps, name):
            fidelity += f", {label} at most {max(_column(steps, name)):{form}}"
    stale = max(_column(steps, "staleness/max"), default=0)
    failed = sum(_column(steps, "rollout/failed")) / len(steps)
    lines.append(f"{fidelity}, staleness at most {stale:.0f}, {failed:.2%} of trajectories failed")
    seconds = sum(_column(steps, "time/step_s"))
    training_s = [r["time/step_s"] - (r.get("time/evaluate_s") or 0.0) for r in steps]  # which speeds are of
    tokens = sum((r.get("tokens_per_s") or 0.0) * s for r, s in zip(steps, training_s, strict=True))
    speed = f", {tokens / sum(training_s):,.0f} tokens/s" if tokens else ""  # none if nothing was generated, as in supervised fine-tuning
    which = f"steps {steps[0]['step']} to {steps[-1]['step']}"
    lines.append(f"{seconds:.1f} s in steps, {seconds / len(steps):.2f} s each{speed} ({which})")
    return lines


def _column(rows: Rows, name: str) -> list[float]:
    return [r[name] for r in rows if r.get(name) is not None]


def _evaluations(rows: Rows) -> list[str]:
    """The rewards of what was evaluated: the held-out share, then the named sets."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in ("eval/reward", *(name for _, name in set_rewards(names))) if _column(rows, name)]


def _change(name: str, values: Sequence[float]) -> str:
    return f"{name} {values[0]:.3f} -> {values[-1]:.3f}" if values else f"{name} unknown"


def draw(rows: Rows, path: Path, title: str) -> None:
    """Writes `report.png`: reward, mismatch and where the time went, by step. Loads matplotlib without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r for r in rows if r["kind"] == "step"]
    figure = Figure(figsize=(9, 9))
    FigureCanvasAgg(figure)
    reward, mismatch, timing = figure.subplots(3, 1, gridspec_kw={"left": 0.1, "right": 0.98, "bottom": 0.06, "top": 0.94, "hspace": 0.15})
    figure.suptitle(title)
    _plot(reward, steps, "reward", "training reward")
    for name in _evaluations(rows):
        _plot(reward, rows, name, "held-out reward" if name == "eval/reward" else name, marker="o")
    if not _column(steps, "reward"):
        _plot(reward, steps, "loss/total", "loss")
    reward.set_ylabel("reward")
    _plot(mismatch, steps, "mismatch/abs_mean", "mean |trainer - behaviour|")
    _plot(mismatch, steps, "mismatch/abs_max", "max |trainer - behaviour|")
    _plot(mismatch, steps, "mismatch/k3", "KL (k3)")
    _plot(mismatch, steps, "routes/differ", "share of routes that differ")
    mismatch.set_ylabel("log-probability")
    if any(_column(steps, "mismatch/abs_max")):  # a run without any mismatch has nothing to show on a logarithmic axis
        mismatch.set_yscale("log")
    _stack(timing, steps)
    for axes in (reward, mismatch, timing):
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
    timing.set_xlabel("step")
    figure.savefig(path, dpi=110)


def _plot(axes: Any, rows: Rows, name: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _stack(axes: Any, steps: Rows) -> None:
    """Phase times as stacked areas; phases that never reach 2 % of a step are summed as "other"."""
    names = sorted({k for r in steps for k in r if k.startswith("time/") and k not in ("time/step_s", "time/other_s")})
    total = sum(r["time/step_s"] for r in steps) or 1.0
    shown = [n for n in names if sum(r.get(n) or 0.0 for r in steps) >= 0.02 * total]
    columns = [[r.get(n) or 0.0 for r in steps] for n in shown]
    rest = [r["time/step_s"] - sum(c[i] for c in columns) for i, r in enumerate(steps)]
    labels = [n.removeprefix("time/").removesuffix("_s") for n in shown]
    axes.stackplot([r["step"] for r in steps], *columns, rest, labels=[*labels, "other"])
    axes.set_ylabel("seconds")
