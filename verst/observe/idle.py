"""Who was busy, who was idle and what the trainer waited for, as shares of time; and which of them holds a run up.

Time is that of the steps, without their evaluations: those are asked for, whatever they cost. Steps that a restart trains again from the
journal wait for nothing and are left out.

    role        is busy
    trainer     unless it waits: for groups (rollout), for a version to be pulled (pull_wait), for its turn on shared devices (lease). While
                it sends weights it does not wait
    replica     while it generates at least one group
    scoring     while at least one group is scored, on any replica
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verst.observe.intervals import Interval, common, passed, total, union, without
from verst.observe.recorded import GroupLife, Pull, StepTime

WAITS = ("generation", "scoring", "weights", "loop")
"""What a trainer may wait for; see `Shares`."""
_CLOSE = 0.1
"""Idle shares that differ by less are balanced."""
_IN_TURNS = 0.8
"""Sum of the idle shares from which the two sides hardly ever work at the same time."""
_NEWEST_STEPS = 20


@dataclass(frozen=True, slots=True)
class Shares:
    """Of `seconds`: the idle share of each role, and what the trainer waited for.

    waits: shares of the time in which the trainer waited and
        generation: a group was being generated;
        scoring: none was generated, but one was scored;
        weights: a version was on its way to the engines, or shared devices were handed over;
        loop: none of these: prompts, messages between processes, the journal.
    replicas: of each, by its number, over the steps in which it was there. Empty if groups were not generated but demonstrated.
    replicas_mean: of all of them, by their time.
    generating: groups being generated at a time, all replicas together, mean.
    """

    seconds: float
    trainer: float
    waits: Mapping[str, float]
    replicas: Mapping[int, float]
    replicas_mean: float
    scoring: float
    generating: float

    def metrics(self) -> dict[str, float]:
        """As they stand in a step's row."""
        found = {"idle/trainer": self.trainer}
        if self.replicas:
            found |= {"idle/replicas": self.replicas_mean, "rollout/generating": self.generating}
            found |= {f"wait/{cause}": share for cause, share in self.waits.items()}
        return found

    @property
    def bottleneck(self) -> Bottleneck | None:
        """None where nothing is generated: then there is only the trainer."""
        return judged(self.trainer, self.replicas_mean, self.waits) if self.replicas else None


def shares(steps: Sequence[StepTime], groups: Sequence[GroupLife], pulls: Sequence[Pull]) -> Shares | None:
    """Over these steps; None if they took no time, or were all trained again."""
    made = [step for step in steps if not step.trained_again]
    time = _time(made)
    seconds = total(time)
    if not seconds:
        return None
    sending = [(pull.sending, pull.sent) for pull in pulls]
    for_groups = without(common([i for s in made for i in s.of("rollout")], time), sending)
    for_weights = without(common([i for s in made for i in s.of("pull_wait", "lease")], time), sending)
    generation, scored = union(group.generation for group in groups), union(group.scored for group in groups)
    unexplained = without(without(for_groups, generation), scored)
    pulling = [(pull.began, pull.ended) for pull in pulls]
    waits = {
        "generation": total(common(for_groups, generation)),
        "scoring": total(common(without(for_groups, generation), scored)),
        "weights": total(for_weights) + total(common(unexplained, pulling)),
        "loop": total(without(unexplained, pulling)),
    }
    there = {number: _time([s for s in made if number in s.replicas]) for number in sorted({n for s in made for n in s.replicas})}
    idle = {number: total(without(own, (g.generation for g in groups if g.replica == number))) for number, own in there.items()}
    counted = passed(time)
    return Shares(
        seconds=seconds,
        trainer=(total(for_groups) + total(for_weights)) / seconds,
        waits={cause: s / seconds for cause, s in waits.items()},
        replicas={number: idle[number] / total(own) for number, own in there.items()},
        replicas_mean=sum(idle.values()) / (sum(map(total, there.values())) or 1.0),
        scoring=1 - total(common(scored, time)) / seconds,
        generating=sum(counted(group.scoring) - counted(group.began) for group in groups) / seconds,
    )


def _time(steps: Sequence[StepTime]) -> list[Interval]:
    """Of steps without their evaluations."""
    return without([(step.began, step.ended) for step in steps], [evaluated for step in steps for evaluated in step.of("evaluate")])


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What holds a run up: training, or what the trainer waits for (`Shares.waits`), or "balanced".

    in_turns: trainer and replicas hardly ever work at the same time.
    """

    name: str
    trainer: float  # idle share
    replicas: float
    in_turns: bool

    def __str__(self) -> str:
        said = self.name if self.name == "balanced" else f"bottleneck: {self.name}"
        turns = ": they take turns" if self.in_turns else ""
        return f"{said} (trainer idle {self.trainer:.0%}, replicas idle {self.replicas:.0%}{turns})"


def judged(trainer: float, replicas: float, waits: Mapping[str, float]) -> Bottleneck:
    """From the idle shares of the trainer and of the replicas (mean), and from what the trainer waited for, by cause.

    The trainer's waiting is compared with that of the replicas while it worked. If the trainer's is longer, its longest part is named.
    """
    neither = trainer - waits["generation"]  # all wait for something else
    for_training = max(0.0, replicas - neither)
    name = "balanced"
    if trainer - for_training >= _CLOSE:
        name = max(waits, key=lambda cause: waits[cause])
    elif for_training - trainer >= _CLOSE:
        name = "training"
    turns = min(waits["generation"], for_training) >= _CLOSE and trainer + replicas >= _IN_TURNS
    return Bottleneck(name, trainer, replicas, in_turns=turns)


def bottleneck_of(rows: Sequence[Mapping[str, Any]]) -> Bottleneck | None:
    """Of the newest steps, from their metric rows, each by its time; None if none of them has idle shares of both sides."""
    taken = [(row, _seconds(row)) for row in rows[-_NEWEST_STEPS:] if row.get("idle/trainer") is not None]
    taken = [(row, seconds) for row, seconds in taken if row.get("idle/replicas") is not None and seconds > 0]
    whole = sum(seconds for _, seconds in taken)
    if not whole:
        return None

    def mean(name: str) -> float:
        return sum(seconds * (row.get(name) or 0.0) for row, seconds in taken) / whole

    waits = {cause: mean(f"wait/{cause}") for cause in WAITS}
    return judged(mean("idle/trainer"), mean("idle/replicas"), waits)


def _seconds(row: Mapping[str, Any]) -> float:
    seconds = (row.get("time/step_s") or 0.0) - (row.get("time/evaluate_s") or 0.0)
    return seconds if math.isfinite(seconds) else 0.0
