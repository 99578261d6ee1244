"""A timeline as a picture: the trainer's phases, the versions on their way, and the groups at each replica, on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verst.observe.recorded import GroupLife, Recorded
from verst.observe.trace import generating, scoring

_COLOURS = {
    "rollout": "#dddddd",
    "pull_wait": "#b5b5b5",
    "lease": "#8f8f8f",
    "load": "#9ecae1",
    "forward_backward": "#3182bd",
    "optimizer": "#08519c",
    "publish": "#74c476",
    "commit": "#238b45",
    "checkpoint": "#9e9ac8",
    "evaluate": "#fee391",
}
"""Waiting is grey."""
_NAMES = {
    "rollout": "wait for groups",
    "pull_wait": "wait for a pull",
    "lease": "hand-over of devices",
    "forward_backward": "forward, backward",
}
_SHOWN_REPLICAS = 8
_NUMBERED_STEPS = 25


def draw_timeline(recorded: Recorded, path: Path, title: str) -> None:
    """Writes the picture. Loads matplotlib without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _replica_rows(recorded)
    began, ended = recorded.steps[0].began, max(step.ended for step in recorded.steps)
    heights = [1.0, 0.5, *(1.0 for _ in rows)]
    tall = 1.5 + 0.7 * sum(heights)
    figure = Figure(figsize=(12, tall))
    FigureCanvasAgg(figure)
    margins = {"left": 0.09, "right": 0.99, "bottom": 0.55 / tall, "top": 1 - 0.85 / tall, "hspace": 0.12}
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, gridspec_kw=margins)
    figure.suptitle(title, fontsize=11)
    _trainer(axes[0], recorded, began)
    _bars(axes[1], [(pull.began - began, pull.ended - pull.began) for pull in recorded.pulls], "#238b45")
    _name(axes[1], "pulls")
    for place, (name, groups) in zip(axes[2:], rows, strict=True):
        _replica(place, name, groups, began, ended)
    for place in axes:
        for step in recorded.steps:
            place.axvline(step.began - began, color="black", alpha=0.25, linewidth=0.6)
    axes[-1].set_xlim(0, ended - began)
    axes[-1].set_xlabel("seconds")
    handles, labels = axes[0].get_legend_handles_labels()
    if rows:
        more = axes[2].get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
    style = {"fontsize": 7, "frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.53, 1 - 0.3 / tall), ncols=len(labels), **style)
    figure.savefig(path, dpi=110)


def _replica_rows(recorded: Recorded) -> list[tuple[str, list[GroupLife]]]:
    """One row for each replica, or one for all where there are too many."""
    numbers = recorded.replicas
    if len(numbers) > _SHOWN_REPLICAS:
        return [(f"{len(numbers)} replicas", list(recorded.groups))]
    return [(f"replica {n}", [life for life in recorded.groups if life.replica == n]) for n in numbers]


def _trainer(axes: Any, recorded: Recorded, began: float) -> None:
    for phase, colour in _COLOURS.items():
        spans = [(b - began, e - b) for step in recorded.steps for b, e in step.of(phase)]
        if spans:
            _bars(axes, spans, colour, label=_NAMES.get(phase, phase))
    _name(axes, "trainer")
    if len(recorded.steps) <= _NUMBERED_STEPS:
        for step in recorded.steps:
            axes.annotate(str(step.step), ((step.began + step.ended) / 2 - began, 1.03), ha="center", fontsize=7, annotation_clip=False)


def _bars(axes: Any, spans: Sequence[tuple[float, float]], colour: str, label: str | None = None) -> None:
    axes.broken_barh(spans, (0, 1), facecolors=colour, label=label)


def _name(axes: Any, name: str) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")


def _replica(axes: Any, name: str, groups: Sequence[GroupLife], began: float, ended: float) -> None:
    """Groups being generated, and in front of them those being scored. Evaluations, of many groups at once, are cut at the top."""
    axes.set_ylabel(f"{name}\n(groups)", rotation=0, ha="right", va="center")
    for counts, colour, label in ((generating(groups), "#fd8d3c", "groups generating"), (scoring(groups), "#a63603", "groups scored")):
        times, values = [0.0, *(at - began for at, _ in counts), ended - began], [0, *(n for _, n in counts), 0]
        style = {"alpha": 0.8} if label == "groups generating" else {"alpha": 0.6}
        axes.fill_between(times, values, step="post", color=colour, label=label, linewidth=0, **style)
    trained = generating([life for life in groups if life.seq >= 0]) or generating(groups)
    axes.set_ylim(0, 1.15 * max((n for _, n in trained), default=1) or 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(axis="y", labelsize=7)
