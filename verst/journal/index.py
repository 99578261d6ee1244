"""What a journal holds, without its payloads: where each record lies, and which groups were trained by which step.

Sequence numbers count from 0, steps from 1; step S makes policy version S.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from verst.errors import InvariantViolation, JournalError


class Location(NamedTuple):
    """Where a frame starts."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """The groups that one step consumed, and what else its samples were made from."""

    step: int
    groups: tuple[int, ...]  # `seq` of each group, in training order
    dropped: tuple[int, ...] = ()  # groups this step took and left out (all members failed, a filter): never offered again
    plan: Mapping[str, Any] = field(default_factory=dict)  # JSON values: what makes assembly repeatable, such as seed and version

    def to_json(self) -> bytes:
        return json.dumps({"step": self.step, "groups": self.groups, "dropped": self.dropped, "plan": dict(self.plan)}).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> BatchRecord:
        values = json.loads(payload)
        return cls(values["step"], tuple(values["groups"]), tuple(values["dropped"]), values["plan"])


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A step whose optimizer updates are done on all ranks."""

    step: int
    digest: str  # the weights hash after the step; training the step again must give it again
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON values, such as metrics

    def to_json(self) -> bytes:
        return json.dumps({"step": self.step, "digest": self.digest, "info": dict(self.info)}).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> CommitRecord:
        return cls(**json.loads(payload))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What remains to be done after the state of some step was restored."""

    retrain: tuple[tuple[int, str | None], ...]  # each journaled step after it, in order, with its committed digest if it has one
    pending: tuple[int, ...]  # `seq` of groups no step took, ascending: train them, do not generate them again
    missing: tuple[int, ...]  # `seq` below `next_seq` that were admitted but never finished: generate them again
    next_seq: int  # the first `seq` never seen


class Index:
    """Groups by seq, batches and commits by step. Refuses whatever would train a group twice or leave a step out."""

    def __init__(self) -> None:
        self.groups: dict[int, Location] = {}
        self.batches: dict[int, Location] = {}
        self.commits: dict[int, Location] = {}
        self._digests: dict[int, str] = {}
        self._taken: dict[int, int] = {}  # seq → the step that took it

    @property
    def last_batch(self) -> int:
        """The newest step with a journaled batch, or 0."""
        return len(self.batches)

    @property
    def last_commit(self) -> int:
        """The newest committed step, or 0."""
        return len(self.commits)

    def check_group(self, seq: int) -> None:
        if seq < 0:
            raise InvariantViolation(f"group seq {seq} is negative: seq counts from 0")
        if seq in self.groups:
            raise InvariantViolation(f"group {seq} is in the journal already")

    def check_batch(self, record: BatchRecord) -> None:
        if record.step != self.last_batch + 1:
            raise InvariantViolation(f"batch of step {record.step} cannot follow that of step {self.last_batch}")
        seqs = (*record.groups, *record.dropped)
        if len(set(seqs)) != len(seqs):
            raise InvariantViolation(f"batch of step {record.step} names a group twice: {list(seqs)}")
        for seq in seqs:
            if seq not in self.groups:
                raise InvariantViolation(f"batch of step {record.step} names group {seq}, which is not in the journal")
            if seq in self._taken:
                raise InvariantViolation(f"batch of step {record.step} names group {seq}, which step {self._taken[seq]} has taken")

    def check_commit(self, record: CommitRecord) -> None:
        if record.step != self.last_commit + 1:
            raise InvariantViolation(f"commit of step {record.step} cannot follow that of step {self.last_commit}")
        if record.step not in self.batches:
            raise InvariantViolation(f"commit of step {record.step} has no batch in the journal")

    def add_group(self, seq: int, where: Location) -> None:
        self.groups[seq] = where

    def add_batch(self, record: BatchRecord, where: Location) -> None:
        self.batches[record.step] = where
        self._taken.update(dict.fromkeys((*record.groups, *record.dropped), record.step))

    def add_commit(self, record: CommitRecord, where: Location) -> None:
        self.commits[record.step] = where
        self._digests[record.step] = record.digest

    def recovery(self, after_step: int) -> Recovery:
        """What to do after restoring the state of `after_step` (0: the initial model).

        Raises `JournalError` if that step was never committed here: state and journal are then of different runs, or the journal lost
        its end, and going on would train something twice.
        """
        if after_step and after_step not in self.commits:
            raise JournalError(
                f"the restored state is of step {after_step}, but the journal's last commit is of step {self.last_commit}: "
                "they do not belong together. Restore an older checkpoint or start another run"
            )
        next_seq = max(self.groups, default=-1) + 1
        return Recovery(
            retrain=tuple((step, self._digests.get(step)) for step in range(after_step + 1, self.last_batch + 1)),
            pending=tuple(sorted(seq for seq in self.groups if seq not in self._taken)),
            missing=tuple(seq for seq in range(next_seq) if seq not in self.groups),
            next_seq=next_seq,
        )
