"""A timeline as a trace for ui.perfetto.dev or chrome://tracing (Trace Event Format, JSON; times in whole microseconds).

    process     thread    events
    trainer     steps     each step, with its phases inside
    weights     pulls     each version on its way into the engines, inside the time in which the trainer sends it
    replica N   lane M    each group: generate and score inside; an arrow leads to the step that consumed it
                          and the number of groups being generated, as a counter

A lane holds one group at a time: there are as many as groups were at the replica at once.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from verst.observe.recorded import GroupLife, Recorded, StepTime

Event = dict[str, Any]

_TRAINER, _WEIGHTS, _FIRST_REPLICA = 1, 2, 3
"""Process ids."""
_WAITS = ("rollout", "pull_wait", "lease")


def write_trace(recorded: Recorded, path: Path, run: str) -> None:
    """Writes the trace of a run."""
    with path.open("w", encoding="utf-8") as file:
        json.dump({"traceEvents": trace_events(recorded), "displayTimeUnit": "ms", "otherData": {"run": run}}, file, separators=(",", ":"))


def trace_events(recorded: Recorded) -> list[Event]:
    """All events; those that name processes and threads come first."""
    placed = lanes(recorded.groups)
    events = [*_names(list(placed), recorded.replicas), *_sessions(recorded), *_steps(recorded.steps), *_pulls(recorded)]
    for (replica, lane), lives in placed.items():
        events += itertools.chain.from_iterable(_group(life, _FIRST_REPLICA + replica, lane) for life in lives)
    return [*events, *_arrows(recorded.steps, placed), *_counters(recorded.groups)]


def lanes(groups: Sequence[GroupLife]) -> dict[tuple[int, int], list[GroupLife]]:
    """By replica and lane, numbered from 1: the groups that were there one after another."""
    found: dict[tuple[int, int], list[GroupLife]] = {}
    for replica in sorted({life.replica for life in groups}):
        taken: list[tuple[float, int]] = []  # heaps: until when a lane is taken; lanes that are free again
        free: list[int] = []
        lanes_made = itertools.count(1)
        for life in sorted((life for life in groups if life.replica == replica), key=lambda life: (life.posted, life.seq)):
            while taken and taken[0][0] <= life.posted:
                heapq.heappush(free, heapq.heappop(taken)[1])
            lane = heapq.heappop(free) if free else next(lanes_made)
            heapq.heappush(taken, (life.ended, lane))
            found.setdefault((replica, lane), []).append(life)
    return found


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _slice(name: str, pid: int, tid: int, began: float, ended: float, category: str, args: Mapping[str, Any] | None = None) -> Event:
    event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": _us(began), "dur": _us(ended) - _us(began)}
    return event | ({"args": dict(args)} if args else {})


def _names(placed: Sequence[tuple[int, int]], replicas: Sequence[int]) -> Iterator[Event]:
    processes = {_TRAINER: "trainer", _WEIGHTS: "weights"} | {_FIRST_REPLICA + n: f"replica {n}" for n in replicas}
    for pid, name in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    threads = {(_TRAINER, 1): "steps", (_WEIGHTS, 1): "pulls"}
    threads |= {(_FIRST_REPLICA + replica, lane): f"lane {lane}" for replica, lane in placed}
    for (pid, tid), name in threads.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _sessions(recorded: Recorded) -> Iterator[Event]:
    for session in recorded.sessions:
        at = datetime.fromtimestamp(session.at, UTC).isoformat(timespec="seconds")
        where = {"pid": _TRAINER, "tid": 1, "ts": _us(session.began)}
        yield {"ph": "i", "s": "g", "name": "the run's process begins", "cat": "run", **where, "args": {"at": at}}


def _steps(steps: Sequence[StepTime]) -> Iterator[Event]:
    for step in steps:
        args = {"groups": list(step.took)} | ({"trained_again": True} if step.trained_again else {})
        yield _slice(f"step {step.step}", _TRAINER, 1, step.began, step.ended, "step", args)
        for phase in step.phases:
            yield _slice(phase.name, _TRAINER, 1, phase.began, phase.ended, "wait" if phase.name in _WAITS else "work")


def _pulls(recorded: Recorded) -> Iterator[Event]:
    for pull in recorded.pulls:
        yield _slice(f"version {pull.version}", _WEIGHTS, 1, pull.began, pull.ended, "pull", {"version": pull.version})
        if pull.sending < pull.sent:
            yield _slice("send", _WEIGHTS, 1, pull.sending, pull.sent, "pull")


def _group(life: GroupLife, pid: int, lane: int) -> Iterator[Event]:
    name, category = (f"group {life.seq}", "group") if life.seq >= 0 else ("evaluation", "evaluation")
    about: dict[str, Any] = {"seq": life.seq, "prompt": life.prompt}
    about |= {"versions": [life.oldest, life.newest], "tokens": life.tokens} if life.came_back else {"came_back": False}
    yield _slice(name, pid, lane, life.posted, life.ended, category, about)
    yield _slice("generate", pid, lane, *life.generation, category)
    yield _slice("score", pid, lane, *life.scored, category)


def _arrows(steps: Sequence[StepTime], placed: Mapping[tuple[int, int], Sequence[GroupLife]]) -> Iterator[Event]:
    """From each group to the steps that consumed it: more than one if a restart trained it again."""
    where = {
        life.seq: (_FIRST_REPLICA + replica, lane, life) for (replica, lane), lives in placed.items() for life in lives if life.seq >= 0
    }
    numbers = itertools.count(1)
    for step in steps:
        loaded = step.of("load")[:1] or [(step.began, step.ended)]
        for pid, lane, life in (where[seq] for seq in step.took if seq in where):
            flow = {"name": "trained", "cat": "trained", "id": next(numbers)}
            yield flow | {"ph": "s", "pid": pid, "tid": lane, "ts": max(_us(life.posted), _us(life.ended) - 1)}  # within its slice
            yield flow | {"ph": "f", "bp": "e", "pid": _TRAINER, "tid": 1, "ts": _us(loaded[0][0])}


def generating(groups: Sequence[GroupLife]) -> list[tuple[float, int]]:
    """When the number of groups being generated changed, and what it was from then on."""
    return _running([life.generation for life in groups])


def scoring(groups: Sequence[GroupLife]) -> list[tuple[float, int]]:
    """The same of the groups being scored."""
    return _running([life.scored for life in groups])


def _running(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, int]]:
    changes: dict[float, int] = {}
    for began, ended in intervals:
        changes[began] = changes.get(began, 0) + 1
        changes[ended] = changes.get(ended, 0) - 1
    times = sorted(changes)
    return list(zip(times, itertools.accumulate(changes[at] for at in times), strict=True))


def _counters(groups: Sequence[GroupLife]) -> Iterator[Event]:
    for replica in sorted({life.replica for life in groups}):
        for at, count in generating([life for life in groups if life.replica == replica]):
            counter = {"ph": "C", "name": "groups generating", "pid": _FIRST_REPLICA + replica, "tid": 0, "ts": _us(at)}
            yield counter | {"args": {"groups": count}}
