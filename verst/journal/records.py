"""What the journal says beside the groups themselves: small records, JSON on disk, each with the key of its frame.

Sequence numbers of groups count from 0, steps from 1; step S makes policy version S. Times are `time.time()`, for people: clocks jump, so
nothing is decided by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from verst.journal.frames import Kind


@dataclass(frozen=True, slots=True)
class Record:
    """Base of all records: how they become the payload of a frame, and come back."""

    kind: ClassVar[Kind]
    key_name: ClassVar[str]

    @property
    def key(self) -> int:
        """The key of its frame."""
        return getattr(self, self.key_name)

    def to_json(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values, default=dict).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        return cls(**json.loads(payload))


@dataclass(frozen=True, slots=True)
class AdmitRecord(Record):
    """A prompt was given a slot. A group that a crash left unfinished is admitted again."""

    kind: ClassVar[Kind] = Kind.ADMIT
    key_name: ClassVar[str] = "seq"

    seq: int
    prompt: str  # the prompt's id
    version: int  # that the engines served then


@dataclass(frozen=True, slots=True)
class BatchRecord(Record):
    """The groups that one step consumed, and what else its samples were made from."""

    kind: ClassVar[Kind] = Kind.BATCH
    key_name: ClassVar[str] = "step"

    step: int
    groups: tuple[int, ...]  # `seq` of each group, in training order
    dropped: Mapping[int, str] = field(
        default_factory=dict
    )  # groups this step took and left out, each with the reason: never offered again
    plan: Mapping[str, Any] = field(default_factory=dict)  # JSON values: what makes assembly repeatable

    @property
    def taken(self) -> tuple[int, ...]:
        """All groups that no later step may take."""
        return (*self.groups, *self.dropped)

    @property
    def left_out(self) -> dict[int, dict[int, str]]:
        """Members of the groups that filters kept out of training, each with the reason, by `seq` of their group."""
        groups: Mapping[Any, Mapping[Any, str]] = self.plan.get("left_out", {})
        return {int(seq): {int(member): reason for member, reason in members.items()} for seq, members in groups.items()}

    @property
    def changed(self) -> dict[str, list[Any]]:
        """Options that have another value from this step on, by dotted name: [before, after]."""
        return self.plan.get("changed", {})

    @classmethod
    def from_json(cls, payload: bytes) -> BatchRecord:
        values = json.loads(payload)
        dropped = {int(seq): reason for seq, reason in values["dropped"].items()}  # JSON has no numbers as keys
        return cls(values["step"], tuple(values["groups"]), dropped, values["plan"])


@dataclass(frozen=True, slots=True)
class CommitRecord(Record):
    """A step whose optimizer updates are done on all ranks."""

    kind: ClassVar[Kind] = Kind.COMMIT
    key_name: ClassVar[str] = "step"

    step: int
    digest: str  # the weights hash after the step; training the step again must give it again
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON values, such as metrics


@dataclass(frozen=True, slots=True)
class PublishRecord(Record):
    """All engines hold a version, and have verified it. A resumed run publishes the version that it restored once more."""

    kind: ClassVar[Kind] = Kind.PUBLISH
    key_name: ClassVar[str] = "version"

    version: int
    digest: str  # the weights hash
    replicas: tuple[int, ...]  # numbers of those that serve it

    @classmethod
    def from_json(cls, payload: bytes) -> PublishRecord:
        values = json.loads(payload)
        return cls(values["version"], values["digest"], tuple(values["replicas"]))


@dataclass(frozen=True, slots=True)
class ConfigRecord(Record):
    """Options of the run that were changed."""

    kind: ClassVar[Kind] = Kind.CONFIG
    key_name: ClassVar[str] = "step"

    step: int  # the last one committed then
    options: Mapping[str, Any]  # by dotted name: [before, after], JSON values


@dataclass(frozen=True, slots=True)
class FaultRecord(Record):
    """A process or part of the run failed."""

    kind: ClassVar[Kind] = Kind.FAULT
    key_name: ClassVar[str] = "step"

    role: str  # such as "trainer rank 1" or "replica 0"
    reason: str
    step: int  # the last one committed then
    time_s: float


@dataclass(frozen=True, slots=True)
class RecoveryRecord(Record):
    """How what had failed came back."""

    kind: ClassVar[Kind] = Kind.RECOVERY
    key_name: ClassVar[str] = "step"

    role: str
    step: int  # the one that it was restored to
    source: str  # such as "snapshot", "checkpoint" or "replacement"
    seconds: float  # that it took
    time_s: float


RECORDS: Mapping[Kind, type[Record]] = {
    found.kind: found for found in (AdmitRecord, BatchRecord, CommitRecord, PublishRecord, ConfigRecord, FaultRecord, RecoveryRecord)
}
"""Every kind of frame that holds a record."""
