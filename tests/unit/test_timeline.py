"""Timelines: idle shares against hand-worked ones, what is written and read back, traces, and runs named by what holds them up."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loop.fakes import FakeParts, config, group
from tests.loop.local import LocalRun, local_run, stopped_after
from verst import cli
from verst.config.schema import Config
from verst.errors import ConfigError
from verst.journal.codec import encode_group
from verst.observe import timeline as module
from verst.observe.idle import WAITS, bottleneck_of, judged, shares
from verst.observe.intervals import Interval, common, passed, total, union, without
from verst.observe.limits import FidelityWatch
from verst.observe.recorded import GroupLife, Phase, Pull, Recorded, Session, StepTime, older, read_timeline
from verst.observe.spans import Spans
from verst.observe.timeline import Timeline
from verst.observe.timeline_picture import draw_timeline
from verst.observe.trace import lanes, trace_events, write_trace
from verst.runtime.loop import Loop
from verst.runtime.observer import Observer
from verst.runtime.parts import Parts
from verst.runtime.pools import Replicas
from verst.runtime.recovery import Cursor, Restored
from verst.runtime.replica import fresh
from verst.runtime.trainer_worker import Published
from verst.runtime.transfer import Brought
from verst.types import Estimates, Group, Prompt

PNG = b"\x89PNG\r\n\x1a\n"


# ---- intervals

INTERVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6)


def points(intervals: Sequence[Interval]) -> set[float]:
    """The unit cells that intervals with whole ends cover."""
    return {n for begin, end in intervals for n in range(int(begin), int(end))}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets_of_points(first: list[Interval], second: list[Interval]):
    assert points(union(first)) == points(first)
    assert points(common(first, second)) == points(first) & points(second)
    assert points(without(first, second)) == points(first) - points(second)
    assert total(first) == len(points(first))
    assert [passed(first)(n) for n in range(14)] == [len(points(first) & set(range(n))) for n in range(14)]
    for found in (union(first), common(first, second), without(first, second)):
        assert all(begin < end for begin, end in found)
        assert all(one[1] < other[0] for one, other in zip(union(found), union(found)[1:], strict=False))


# ---- idle shares


def life(seq: int, replica: int, began: float, scoring: float, ended: float, posted: float | None = None) -> GroupLife:
    return GroupLife(seq, f"p{seq}", replica, began if posted is None else posted, began, scoring, ended, 10, 0, 1)


def step(
    number: int, began: float, ended: float, *phases: tuple[str, float, float], took: Sequence[int] = (), replicas: int = 1
) -> StepTime:
    return StepTime(number, began, ended, tuple(Phase(*phase) for phase in phases), tuple(took), tuple(range(replicas)))


def test_idle_shares_of_hand_worked_intervals():
    """Ten seconds of a step that begins at 100, of which two go to an evaluation: eight count.

    0  1  2  3  4  5  6  7  8  9  10
    [pull ]
          [ g0 on 0    s]
          [ g1 on 1][s ]
    [ rollout        ][ train  ][ eval]
    """
    made = step(
        1, 100, 110, ("rollout", 100, 105), ("load", 105, 107), ("pull_wait", 107, 108), ("evaluate", 108, 110), took=(0, 1), replicas=2
    )
    groups = [life(0, 0, 102, 104, 104.5), life(1, 1, 101.5, 103, 104), life(-1, 0, 108, 110, 110)]
    pulls = [Pull(0, 99, 101, 101, 101)]
    found = shares([made], groups, pulls)
    assert found is not None
    assert found.seconds == 8
    assert found.trainer == pytest.approx(6 / 8)  # five seconds for groups, one for a pull
    assert found.waits == {
        "generation": pytest.approx(2.5 / 8),  # 101.5 to 104
        "scoring": pytest.approx(0.5 / 8),  # 104 to 104.5: until then something was still generated
        "weights": pytest.approx(2 / 8),  # 100 to 101 of the rollout, and pull_wait
        "loop": pytest.approx(1 / 8),  # 101 to 101.5, 104.5 to 105
    }
    assert found.replicas == {0: pytest.approx(1 - 2 / 8), 1: pytest.approx(1 - 1.5 / 8)}  # the evaluation's own groups do not count
    assert found.replicas_mean == pytest.approx(1 - 3.5 / 16)
    assert found.scoring == pytest.approx(1 - 1.5 / 8)
    assert found.generating == pytest.approx(3.5 / 8)


def test_a_replica_is_idle_only_while_it_is_there():
    steps = [step(1, 0, 10, ("rollout", 0, 1)), step(2, 10, 20, ("rollout", 10, 11), replicas=2), step(3, 20, 30, ("rollout", 20, 21))]
    found = shares(steps, [life(0, 0, 0, 15, 15), life(1, 1, 11, 16, 16)], [])
    assert found is not None
    assert found.replicas == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    assert found.replicas_mean == pytest.approx(20 / 40)


def test_a_trainer_that_sends_weights_does_not_wait():
    made = step(1, 0, 10, ("rollout", 0, 6), ("load", 6, 10))
    found = shares([made], [life(0, 0, 3, 6, 6)], [Pull(0, 0, 3, 1, 3)])
    assert found is not None
    assert found.trainer == pytest.approx(0.4)
    assert found.waits == {"generation": pytest.approx(0.3), "scoring": 0, "weights": pytest.approx(0.1), "loop": 0}


def test_steps_trained_again_and_steps_without_time_have_no_shares():
    assert shares([step(1, 0, 1, ("load", 0, 1))], [], []) is None
    assert shares([step(1, 0, 0, ("rollout", 0, 0))], [], []) is None


def test_without_generation_there_is_only_the_trainer():
    found = shares([step(1, 0, 4, ("rollout", 0, 1), replicas=0)], [], [])
    assert found is not None
    assert found.metrics() == {"idle/trainer": 0.25}
    assert found.bottleneck is None


@pytest.mark.parametrize(
    ("trainer", "replicas", "waits", "says"),
    [
        (0.41, 0.02, (0.38, 0.03, 0, 0), "bottleneck: generation (trainer idle 41%, replicas idle 2%)"),
        (0.95, 0.0, (0.95, 0, 0, 0), "bottleneck: generation (trainer idle 95%, replicas idle 0%)"),
        (0.62, 0.40, (0.60, 0, 0.02, 0), "bottleneck: generation (trainer idle 62%, replicas idle 40%: they take turns)"),
        (0.41, 0.30, (0.10, 0.28, 0.03, 0), "bottleneck: scoring (trainer idle 41%, replicas idle 30%)"),
        (0.95, 0.89, (0.08, 0.87, 0, 0), "bottleneck: scoring (trainer idle 95%, replicas idle 89%)"),
        (0.97, 0.91, (0.07, 0, 0.89, 0.01), "bottleneck: weights (trainer idle 97%, replicas idle 91%)"),
        (0.40, 0.46, (0.08, 0, 0.31, 0.01), "bottleneck: weights (trainer idle 40%, replicas idle 46%)"),
        (0.90, 0.95, (0.05, 0, 0, 0.85), "bottleneck: loop (trainer idle 90%, replicas idle 95%)"),
        (0.03, 0.38, (0.02, 0.01, 0, 0), "bottleneck: training (trainer idle 3%, replicas idle 38%)"),
        (0.30, 0.72, (0.28, 0, 0.02, 0), "bottleneck: training (trainer idle 30%, replicas idle 72%: they take turns)"),
        (0.05, 0.10, (0.05, 0, 0, 0), "balanced (trainer idle 5%, replicas idle 10%)"),
        (0.49, 0.51, (0.49, 0, 0, 0), "balanced (trainer idle 49%, replicas idle 51%: they take turns)"),
    ],
)
def test_the_side_that_idles_waits_for_the_other(trainer: float, replicas: float, waits: tuple[float, ...], says: str):
    assert str(judged(trainer, replicas, dict(zip(WAITS, waits, strict=True)))) == says


def test_the_bottleneck_of_rows_is_that_of_the_newest_steps_by_their_time():
    def row(trainer: float | None, replicas: float, step_s: float, **more: float) -> dict[str, Any]:
        return {"idle/trainer": trainer, "idle/replicas": replicas, "time/step_s": step_s, "wait/generation": trainer or 0.0} | more

    old = [row(0.0, 0.9, 100.0)] * 5
    assert str(bottleneck_of([*old, *[row(0.5, 0.1, 1.0)] * 20])) == "bottleneck: generation (trainer idle 50%, replicas idle 10%)"
    evaluated = row(0.0, 0.8, 100.0, **{"time/evaluate_s": 99.0})  # one second of it counts
    assert str(bottleneck_of([row(0.6, 0.0, 3.0), evaluated])) == "bottleneck: generation (trainer idle 45%, replicas idle 20%)"
    assert bottleneck_of([row(None, 0.5, 1.0), {"time/step_s": 1.0}]) is None
    assert bottleneck_of([row(0.5, 0.5, 0.0)]) is None


# ---- recording


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.8e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def spans(began: float, ended: float, *phases: tuple[str, float, float]) -> Spans:
    found = Spans()
    found.began, found.ended, found.phases = began, ended, list(phases)
    return found


def rolled(timeline: Timeline, clock: Clock, seq: int, posted: float, ended: float, *, roll_s: float, score_s: float = 0.0) -> Group:
    """A group of two trajectories of one token each."""
    made = replace(group(seq, 3), timings={"roll_s": roll_s, "score_s": score_s})
    clock.now = posted
    with timeline.group(seq, made.prompt.id, 0) as became:
        clock.now = ended
        became.append(made)
    return made


def test_a_group_is_placed_by_what_its_replica_tells(tmp_path: Path, clock: Clock):
    timeline = Timeline(tmp_path / "t.jsonl")
    made = rolled(timeline, clock, 7, 1001, 1010, roll_s=6, score_s=2)
    timeline.pulled(3, (1000.5, 1000.75), None)
    timeline.step(4, [made], spans(1000, 1011, ("rollout", 1000, 1010.5)))
    timeline.close()
    read = read_timeline(tmp_path / "t.jsonl")
    assert read.groups == [GroupLife(7, "p7", 0, posted=1, began=2, scoring=8, ended=10, tokens=2, oldest=3, newest=3)]
    assert read.pulls == [Pull(3, 0.5, 0.75, 0.75, 0.75)]
    assert read.steps == [step(4, 0, 11, ("rollout", 0, 10.5), took=[7], replicas=0)]
    assert read.sessions == [Session(0, 1.8e9 + 1000)]


def test_what_is_in_flight_counts_as_generating_until_it_is_known(clock: Clock):
    timeline = Timeline()
    timeline.replicas = lambda: range(1)
    with timeline.group(0, "p0", 0):
        clock.now = 1010
        metrics = timeline.step(1, [], spans(1000, 1010, ("rollout", 1000, 1008)))
    assert (metrics["idle/trainer"], metrics["idle/replicas"], metrics["rollout/generating"]) == (0.8, 0.0, 1.0)
    assert timeline.step(2, [], spans(1010, 1020, ("rollout", 1010, 1011)))["idle/replicas"] == 1.0  # it became nothing


def test_groups_that_come_while_a_step_is_evaluated_are_the_next_steps(clock: Clock):
    """Synchronous: the engines have the version before the evaluation, so the next groups are rolled beside it."""
    timeline = Timeline()
    rolled(timeline, clock, 0, 1000, 1004, roll_s=4)
    evaluated = spans(1000, 1030, ("rollout", 1000, 1004), ("load", 1004, 1010), ("evaluate", 1010, 1030))
    rolled(timeline, clock, 1, 1010, 1014, roll_s=4)
    rolled(timeline, clock, -1, 1010, 1030, roll_s=20)  # of the evaluation: not counted
    assert timeline.step(1, [], evaluated)["tokens_per_s"] == pytest.approx(2 / 10)
    after = timeline.step(2, [], spans(1030, 1036, ("rollout", 1030, 1030), ("load", 1030, 1036)))
    assert after["tokens_per_s"] == pytest.approx(2 / 10)  # four seconds beside the evaluation and its own six, as a step without one
    rolled(timeline, clock, 2, 1036, 1040, roll_s=4)
    assert timeline.step(3, [], spans(1036, 1046, ("rollout", 1036, 1040)))["tokens_per_s"] == pytest.approx(2 / 10)
    assert "tokens_per_s" not in timeline.step(4, [], spans(1046, 1047, ("load", 1046, 1047)))


# ---- on disk


def test_a_group_that_never_came_back_is_known_of(tmp_path: Path, clock: Clock):
    """It was generated for as long as the run lived, and came back in no row."""
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path)
    clock.now = 1002
    lost = timeline.group(5, "p5", 0)
    lost.__enter__()  # and no exit: the process is gone with it
    with timeline.group(-1, "e0", 0) as became:
        timeline.step(1, [], spans(1000, 1004, ("rollout", 1000, 1003)))
        clock.now = 1006
        became.append(replace(group(-1, 0), timings={"roll_s": 4}))
        timeline.step(2, [], spans(1004, 1008, ("rollout", 1004, 1007)))
    timeline.step(3, [], spans(1008, 1012, ("rollout", 1008, 1012)))  # the evaluation's group came back
    timeline.close()
    read = read_timeline(path)
    assert [(life.seq, life.posted, life.ended, life.came_back) for life in read.groups] == [(-1, 2, 6, True), (5, 2, 12, False)]
    assert [row.count('"p5"') for row in path.read_text().splitlines()] == [0, 1, 0, 0, 0]
    require_valid(trace_events(read))


def test_a_group_that_another_replica_rolls_again_ends_at_the_first(tmp_path: Path, clock: Clock):
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path)
    clock.now = 1002
    with timeline.group(5, "p5", 0):
        timeline.step(1, [], spans(1000, 1004, ("rollout", 1000, 1003)))
        clock.now = 1005
    clock.now = 1009
    with timeline.group(5, "p5", 1) as became:
        clock.now = 1011
        became.append(replace(group(5, 0), timings={"roll_s": 2}))
    timeline.step(2, [], spans(1004, 1012, ("rollout", 1004, 1012)))
    timeline.close()
    read = read_timeline(path)
    assert [(life.replica, life.posted, life.ended, life.tokens) for life in read.groups] == [(0, 2, 5, 0), (1, 9, 11, 2)]


def recorded_session(path: Path, clock: Clock, first: int, count: int) -> None:
    timeline = Timeline(path)
    timeline.replicas = lambda: range(2)
    for number in range(first, first + count):
        made = rolled(timeline, clock, number, clock.now, clock.now + 3, roll_s=2, score_s=0.5)
        timeline.step(
            number, [made], spans(clock.now - 3, clock.now + 1, ("rollout", clock.now - 3, clock.now), ("load", clock.now, clock.now + 1))
        )
        clock.now += 1
    timeline.close()


def test_a_resumed_run_goes_on_behind_what_it_had_without_the_time_between(tmp_path: Path, clock: Clock):
    path = tmp_path / "timeline.jsonl"
    recorded_session(path, clock, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "began": 8, "en')  # the process was killed here
    clock.now = 5.0  # another machine, whose clock began anew
    recorded_session(path, clock, 3, 2)
    read = read_timeline(path)
    assert [s.step for s in read.steps] == [1, 2, 3, 4]
    assert [(s.began, s.ended) for s in read.steps] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert [life.seq for life in read.groups] == [1, 2, 3, 4]
    assert read.groups[2].posted == 8
    assert [s.began for s in read.sessions] == [0, 8]
    assert read.replicas == [0, 1]
    found = shares(read.steps, read.groups, read.pulls)
    assert found is not None
    assert (found.trainer, found.replicas, found.replicas_mean) == (0.75, {0: 0.5, 1: 1.0}, 0.75)


def test_lines_that_are_none_are_skipped(tmp_path: Path, clock: Clock):
    path = tmp_path / "timeline.jsonl"
    recorded_session(path, clock, 1, 1)
    path.write_text('{"step": 0}\n[1]\n' + path.read_text() + "nonsense\n" + '{"groups": [], "pulls": []')
    assert [s.step for s in read_timeline(path).steps] == [1]


@pytest.mark.parametrize("text", [None, "", "nonsense\n"])
def test_no_timeline_is_told(tmp_path: Path, text: str | None):
    path = tmp_path / "timeline.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="has no timeline: it begins with a run's first step"):
        read_timeline(path)


def test_two_files_of_bounded_size_are_kept(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_FILE_BYTES", 2000)
    path = tmp_path / "timeline.jsonl"
    recorded_session(path, clock, 1, 100)
    files = {file: file.stat().st_size for file in tmp_path.iterdir()}
    assert older(path) in files
    assert files.keys() <= {path, older(path)}
    assert max(files.values()) <= 2400  # the row that makes it too large is in it
    read = read_timeline(path)
    steps = [s.step for s in read.steps]
    assert 8 < len(steps) < 30
    assert steps == list(range(101 - len(steps), 101))
    assert len(read.sessions) == 1
    assert all(one.ended == other.began for one, other in zip(read.steps, read.steps[1:], strict=False))


def test_a_disk_that_does_not_take_it_ends_the_timeline_and_not_the_run(tmp_path: Path, clock: Clock):
    timeline = Timeline(tmp_path / "gone" / "timeline.jsonl")
    metrics = timeline.step(1, [], spans(1000, 1010, ("rollout", 1000, 1005)))
    assert metrics["idle/trainer"] == 0.5
    assert timeline.trouble is not None
    assert "No such file or directory" in timeline.trouble
    assert "the run goes on" in timeline.trouble
    timeline.trouble = None
    timeline.step(2, [], spans(1010, 1020, ("rollout", 1010, 1015)))
    assert timeline.trouble is None  # told once
    timeline.close()


def test_a_range_of_steps_has_what_happened_meanwhile(tmp_path: Path, clock: Clock):
    recorded_session(tmp_path / "t.jsonl", clock, 1, 10)
    read = read_timeline(tmp_path / "t.jsonl")
    some = read.of_steps(4, 5)
    assert ([s.step for s in some.steps], [g.seq for g in some.groups]) == ([4, 5], [4, 5])
    assert [s.step for s in read.of_steps(9, None).steps] == [9, 10]
    assert [s.step for s in read.newest(3).steps] == [8, 9, 10]
    with pytest.raises(ConfigError, match="no step of that range is in the timeline, which has steps 1 to 10"):
        read.of_steps(11, 12)


# ---- traces

REQUIRED = {"X": {"name", "ts", "dur", "pid", "tid"}, "M": {"name", "pid", "args"}, "C": {"name", "ts", "pid", "args"}}
REQUIRED |= {"i": {"name", "ts", "pid", "tid", "s"}, "s": {"name", "ts", "pid", "tid", "id"}, "f": {"name", "ts", "pid", "tid", "id", "bp"}}


def require_valid(events: Sequence[dict[str, Any]]) -> None:
    """The rules of the Trace Event Format: required keys, no negative times, and slices of one thread nest or do not overlap."""
    threads: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        assert REQUIRED[event["ph"]] <= event.keys(), event
        if "ts" in event:
            assert isinstance(event["ts"], int)
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in threads.values():
        open_ends: list[int] = []
        for began, ended in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_ends and open_ends[-1] <= began:
                open_ends.pop()
            assert not open_ends or ended <= open_ends[-1], "two slices of one thread overlap"
            open_ends.append(ended)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert threads.keys() <= named
    require_arrows(events, threads)


def require_arrows(events: Sequence[dict[str, Any]], threads: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Each arrow has one beginning and one end, forward in time, and each lies on a slice."""
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert len(starts) == sum(e["ph"] == "s" for e in events)
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        assert start["ts"] <= ends[number]["ts"]
        for end in (start, ends[number]):
            assert any(began <= end["ts"] <= ended for began, ended in threads[end["pid"], end["tid"]])


TIMES = st.lists(st.integers(0, 50_000_000).map(lambda us: us / 1e6), min_size=4, max_size=4).map(sorted)


@given(st.lists(st.tuples(TIMES, st.integers(0, 2), st.booleans()), max_size=25))
def test_any_groups_make_a_valid_trace(drawn: list[tuple[list[float], int, bool]]):
    groups = [
        GroupLife(seq if trains else -1 - seq, f"p{seq}", replica, posted, began, scoring, ended, 5, 0, 1)
        for seq, ((posted, began, scoring, ended), replica, trains) in enumerate(drawn)
    ]
    made = step(1, 0, 60, ("rollout", 0, 50), ("load", 50, 55), took=[life.seq for life in groups if life.seq >= 0])
    events = trace_events(Recorded([Session(0, 1.8e9)], [made], groups, [Pull(1, 51, 53, 51.5, 52), Pull(2, 53, 54, 54, 54)]))
    require_valid(events)
    assert sum(e["name"] == "generate" for e in events) == len(groups)
    assert sum(e["ph"] == "f" for e in events) == len(made.took)


def test_lanes_are_as_many_as_groups_at_a_time():
    groups = [life(0, 0, 0, 2, 3), life(1, 0, 1, 4, 5), life(2, 0, 3, 6, 7), life(3, 1, 0, 9, 9), life(4, 0, 5, 6, 6)]
    assert {place: [g.seq for g in lives] for place, lives in lanes(groups).items()} == {(0, 1): [0, 2], (0, 2): [1, 4], (1, 1): [3]}


def test_a_trace_says_what_a_group_was_and_which_steps_trained_it(tmp_path: Path):
    steps = [step(1, 0, 5, ("rollout", 0, 3), ("load", 3, 5), took=[0]), step(1, 5, 7, ("load", 5.5, 7), took=[0])]
    recorded = Recorded([Session(0, 1.8e9), Session(5, 1.8e9 + 60)], steps, [life(0, 0, 1, 2, 3, posted=0.5)], [])
    write_trace(recorded, tmp_path / "t.json", "night")
    written = json.loads((tmp_path / "t.json").read_text())
    events = written["traceEvents"]
    require_valid(events)
    (found,) = [e for e in events if e["name"] == "group 0"]
    assert (found["ts"], found["dur"]) == (500_000, 2_500_000)
    assert found["args"] == {"seq": 0, "prompt": "p0", "versions": [0, 1], "tokens": 10}
    assert [e["ts"] for e in events if e["ph"] == "f"] == [3_000_000, 5_500_000]  # a restart trained it again
    assert [e["args"]["at"] for e in events if e["ph"] == "i"] == ["2027-01-15T08:00:00+00:00", "2027-01-15T08:01:00+00:00"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"trainer", "weights", "replica 0"}
    assert [(e["ts"], e["args"]["groups"]) for e in events if e["ph"] == "C"] == [(1_000_000, 1), (2_000_000, 0)]
    assert written["otherData"] == {"run": "night"}


@pytest.mark.parametrize("replicas", [0, 1, 8, 9])
def test_a_picture_has_a_row_for_each_replica_until_they_are_many(tmp_path: Path, replicas: int):
    groups = [life(n, n, 1, 2, 3) for n in range(replicas)]
    recorded = Recorded([Session(0, 1.8e9)], [step(1, 0, 5, ("rollout", 0, 3), ("load", 3, 5), replicas=replicas)], groups, [])
    draw_timeline(recorded, tmp_path / "t.png", "night")
    written = (tmp_path / "t.png").read_bytes()
    assert written[:8] == PNG
    rows = 1 if replicas == 9 else replicas
    assert int.from_bytes(written[20:24], "big") == pytest.approx(110 * (1.5 + 0.7 * (1.5 + rows)), abs=1)


# ---- runs


class Replica:
    """A worker that takes `roll_s` to generate a group and `score_s` to score it; `parts` know the version that it serves."""

    name = "replica 0"

    def __init__(self, parts: FakeParts, roll_s: float, score_s: float) -> None:
        self._parts, self._roll_s, self._score_s = parts, roll_s, score_s

    async def call(self, method: str, /, *args: Any) -> Any:
        raise AssertionError(method)

    async def post(self, method: str, /, seq: int, prompt: Prompt, how: str, known: Any) -> bytes:
        assert method == "roll"
        version = self._parts.serving
        timings: dict[str, float] = {}
        for name, seconds in (("roll_s", self._roll_s), ("score_s", self._score_s)):
            began = module.time.perf_counter()
            if seconds:
                await asyncio.sleep(seconds)
            timings[name] = module.time.perf_counter() - began  # on a busy machine longer than asked for
        return encode_group(replace(group(seq, version), timings=timings))

    async def stacks(self) -> str:
        return ""

    def kill(self) -> None: ...


class TimedParts(FakeParts):
    """Fakes whose trainer, engine, scorer and transfer take time, around the real replicas and the real observer."""

    def __init__(
        self, cfg: Config, root: Path, *, train_s: float = 0.0, roll_s: float = 0.0, score_s: float = 0.0, pull_s: float = 0.0
    ) -> None:
        super().__init__(cfg, root)
        paths = {"metrics": "metrics.jsonl", "timeline": "timeline.jsonl", "log": "run.log"}
        run = SimpleNamespace(root=root, **{name: root / file for name, file in paths.items()})
        self.observer = cast(Any, Observer(cast(Any, run), cfg.run.steps, FidelityWatch(0.01, "warn")))
        self.replicas = cast(Any, Replicas(fresh([cast(Any, Replica(self, roll_s, score_s))]), cfg, timeline=self.observer.timeline))
        self.pull_s = pull_s
        train = self.trainers.forward_backward

        async def slowly(update: int, advantages: Estimates, returns: Sequence[Any] = ()) -> Any:
            await asyncio.sleep(train_s)
            return await train(update, advantages, returns)

        self.trainers.forward_backward = slowly

    async def evaluate(self, step: int) -> dict[str, float]:
        await asyncio.gather(*(self.replicas.roll(-1 - n, Prompt(f"e{n}", ()), "evaluation") for n in range(2)))
        return await super().evaluate(step)

    async def bring(self, published: Published, probe_T: Any) -> Brought:
        began = module.time.perf_counter()
        await super().bring(published, probe_T)
        return Brought(0.0, {}, (began, module.time.perf_counter()))


async def run_timed(cfg: Config, root: Path, **seconds: float) -> list[dict[str, Any]]:
    """The step rows of a run of these parts."""
    parts = TimedParts(cfg, root, **seconds)
    await asyncio.wait_for(Loop(cfg, cast(Parts, parts), Restored(0, Cursor(0, parts.stream.state()))).run(), 60)
    parts.observer.close()
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a first run imports would be measured as waiting."""
    asyncio.run(run_timed(config(), tmp_path_factory.mktemp("first")))


EVALUATES: dict[str, dict[str, Any]] = {"eval": {"every_steps": 1}, "data": {"holdout": 0.1}}


def asynchronous(steps: int = 6, **sections: dict[str, Any]) -> Config:
    rollout = {"group_size": 2, "deadline_s": 5.0, "capacity_groups": 6, "window_groups": 2}
    return config(run={"steps": steps}, rollout=rollout, **sections)


@pytest.mark.parametrize(
    ("cfg", "seconds", "name"),
    [
        (asynchronous(), {"roll_s": 0.25, "train_s": 0.01}, "generation"),
        (asynchronous(), {"roll_s": 0.01, "train_s": 0.12}, "training"),
        (config(), {"roll_s": 0.01, "score_s": 0.25}, "scoring"),
        (config(), {"pull_s": 0.25, "roll_s": 0.01}, "weights"),
        (config(), {"roll_s": 0.25, "train_s": 0.05}, "generation"),
    ],
)
@pytest.mark.usefixtures("_imported")
async def test_a_run_is_named_by_what_holds_it_up(tmp_path: Path, cfg: Config, seconds: dict[str, float], name: str):
    rows = await run_timed(cfg, tmp_path, **seconds)
    found = bottleneck_of(rows)
    assert found is not None
    assert found.name == name, str(found)
    read = read_timeline(tmp_path / "timeline.jsonl")
    assert [s.step for s in read.steps] == list(range(1, cfg.run.steps + 1))
    later = shares(read.steps, read.groups, read.pulls)  # of all that is known afterwards
    assert later is not None
    assert later.bottleneck is not None
    assert later.bottleneck.name == name
    assert [pull.version for pull in read.pulls] == list(range(cfg.run.steps + 1))  # the last one came after the last step
    require_valid(trace_events(read))


async def test_scoring_of_groups_in_flight_is_known_afterwards(tmp_path: Path):
    await run_timed(asynchronous(), tmp_path, roll_s=0.02, score_s=0.25)
    read = read_timeline(tmp_path / "timeline.jsonl")
    found = shares(read.steps, read.groups, read.pulls)
    assert found is not None
    assert found.bottleneck is not None
    assert found.bottleneck.name == "scoring"


async def test_synchronous_sides_take_turns(tmp_path: Path):
    rows = await run_timed(config(), tmp_path, roll_s=0.1, train_s=0.05)
    found = bottleneck_of(rows)
    assert found is not None
    assert found.in_turns
    assert all(row["rollout/generating"] > 0.5 for row in rows)


@pytest.mark.parametrize("cfg", [config(**EVALUATES), asynchronous(6, **EVALUATES)])
async def test_every_step_that_generated_has_its_speed_also_after_an_evaluation(tmp_path: Path, cfg: Config):
    rows = await run_timed(cfg, tmp_path, roll_s=0.05, train_s=0.05)
    speeds = [row["tokens_per_s"] for row in rows[:3]]
    assert len(speeds) == 3
    if cfg.capacity_groups == cfg.train.groups_per_step:  # four tokens in 0.1 s: not 0.05 s, which is the training alone
        assert max(speeds) < 4 / 0.1


async def test_a_resumed_run_goes_on_with_its_timeline(tmp_path: Path, tiny: Path, prompts: Path):
    values = {"data": {"path": str(prompts), "max_prompt_tokens": 64}, "checkpoint": {"every_steps": 100}}
    run = local_run(tmp_path, tiny, values, reward=letters)
    await stopped_after(run, 2)
    await run.go()
    read = read_timeline(run.run.timeline)
    assert [(s.step, s.trained_again) for s in read.steps] == [(1, False), (2, False), (1, True), (2, True), (3, False)]
    assert len(read.sessions) == 2
    assert read.steps[1].ended <= read.sessions[1].began <= read.steps[2].began
    events = trace_events(read)
    require_valid(events)
    taken = [seq for s in read.steps for seq in s.took]
    assert sum(e["ph"] == "f" for e in events) == len(taken)  # also of those that the first process generated
    assert all("idle/trainer" in row for row in run.rows if row["kind"] == "step")  # of the first time, if there was one


def letters(trajectory: Any, fields: Any) -> float:
    return float(sum(map(ord, trajectory.completion)) % 5)


# ---- the command


def test_the_command_on_a_real_run(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["timeline", str(done_run.run.root), "--step", "2:3", "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "steps 2 to 3, " in said
    assert "\nbottleneck: " in said or "\nbalanced (" in said
    for role in ("trainer", "replica 0", "scoring"):
        assert f"\n{role}" in said
    assert (tmp_path / "new" / "timeline.png").read_bytes()[:8] == PNG
    events = json.loads((tmp_path / "new" / "timeline.trace.json").read_text())["traceEvents"]
    require_valid(events)
    assert [e["name"] for e in events if e["name"].startswith("step ")] == ["step 2", "step 3"]
    taken = next(e for e in events if e["name"] == "step 3")["args"]["groups"]
    assert {e["args"]["seq"] for e in events if e["name"].startswith("group ")} >= set(taken)
    assert {"evaluate", "checkpoint", "pull_wait"} <= {e["name"] for e in events}


def test_the_command_for_programs(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["timeline", str(done_run.run.root), "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["last"]) == (1, 4)
    assert set(found["idle"]) == {"trainer", "replica 0", "scoring"}
    assert sum(found["waits"].values()) <= found["idle"]["trainer"] + 1e-9
    assert found["bottleneck"] in ("generation", "scoring", "weights", "training", "balanced")
    assert Path(found["trace"]).exists()


def test_the_command_tells_what_is_wrong(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["timeline", str(done_run.run.root), "--step", "9", "--out", str(tmp_path)]) == 1
    assert "no step of that range is in the timeline, which has steps 1 to 4" in capsys.readouterr().err
    assert cli.main(["timeline", str(tmp_path)]) == 1
    assert "ConfigError" in capsys.readouterr().err
