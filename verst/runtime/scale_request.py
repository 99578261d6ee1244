"""`verst scale RUN rollout=N`: asks a living run for another number of replicas, from any terminal that sees its directory.

The wish is a file in the run's directory, the answer another one. Both are whole at every moment, and the newest wish counts:

    RUN/scale.json          id, replicas                 written here, read by the run once a second (`verst.runtime.scaler`)
    RUN/scale-answer.json   id, lines, state             written by the run whenever something came of it
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from verst.errors import ConfigError, DeadlineExceeded, VerstError
from verst.journal.lock import holder_of
from verst.runtime.rundir import RunDirectory, replace_file

_POLL_S = 0.2
_TRAINER_ROLES = ("train", "trainer", "trainers", "ranks")


class ScaleFailed(VerstError):
    """A run did not reach the number of replicas that it was asked for. The message says what it has instead."""


class State(StrEnum):
    """What came of a wish so far."""

    UNDER_WAY = "under way"
    DONE = "done"
    FAILED = "failed"  # the run goes on with what it has
    REFUSED = "refused"  # nothing was changed


@dataclass(frozen=True, slots=True)
class ScaleRequest:
    """A wish for so many replicas."""

    id: str
    replicas: int

    @classmethod
    def new(cls, replicas: int) -> ScaleRequest:
        return cls(uuid.uuid4().hex, replicas)

    def write(self, run: RunDirectory) -> None:
        """Puts it in the place of the one before. Several may do so at the same time: each writes a file of its own first."""
        mine = run.scale_request.with_name(f"{run.scale_request.name}.{self.id}")
        replace_file(mine, json.dumps(asdict(self)).encode())
        mine.rename(run.scale_request)

    @classmethod
    def read(cls, run: RunDirectory) -> ScaleRequest | None:
        """The newest wish; None if there is none, or what lies there is none."""
        match _read(run.scale_request):
            case {"id": str(name), "replicas": int(replicas)} if replicas > 0:
                return cls(name, replicas)
        return None


@dataclass(frozen=True, slots=True)
class ScaleAnswer:
    """What came of the wish `id`, line by line."""

    id: str
    lines: tuple[str, ...]
    state: State

    def write(self, run: RunDirectory) -> None:
        replace_file(run.scale_answer, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, run: RunDirectory) -> ScaleAnswer | None:
        match _read(run.scale_answer):
            case {"id": str(name), "lines": list(lines), "state": str(state)}:
                return cls(name, tuple(map(str, lines)), State(state))
        return None


def scale(path: str | Path, wish: str, *, wait_s: float, echo: Callable[[str], None]) -> None:
    """Asks a living run for another number of replicas ("rollout=3"), and tells what comes of it until that is done.

    The wish stays in place if nobody waits for it any more. With `wait_s` 0 nobody does.

    Raises:
        ConfigError: this is no such wish, the run does not live, or it refuses.
        ScaleFailed: the run goes on with another number, or has ended.
        DeadlineExceeded: it was not done within `wait_s` seconds.
    """
    run, _ = RunDirectory.open(path)
    replicas = _wanted(wish, run)
    if holder_of(run.root) is None:
        raise ConfigError(f"{run.root} is not running: begin with that number by: verst resume {run.root} rollout.replicas={replicas}")
    request = ScaleRequest.new(replicas)
    request.write(run)
    echo(f"asked {run.root} for {replicas} replica(s)")
    if wait_s:
        _follow(run, request, wait_s, echo)


def _wanted(wish: str, run: RunDirectory) -> int:
    role, _, number = wish.partition("=")
    if role in _TRAINER_ROLES:
        raise ConfigError(
            f"{wish}: ranks of the trainer cannot come or go while a run lives; stop it, then: "
            f"verst resume {run.root} train.ranks={number or 'N'}"
        )
    if role != "rollout":
        raise ConfigError(f"{wish}: what can be scaled is rollout, the engine replicas: rollout=N")
    if not (number.isascii() and number.isdecimal() and int(number) > 0):
        raise ConfigError(f"{wish}: give the number of replicas, 1 or more: rollout=2")
    return int(number)


def _follow(run: RunDirectory, request: ScaleRequest, wait_s: float, echo: Callable[[str], None]) -> None:
    """Tells what comes of a request until it is done."""
    deadline, told = time.monotonic() + wait_s, 0
    while True:
        alive = holder_of(run.root) is not None  # asked before reading, so that its last lines are read
        answer = ScaleAnswer.read(run)
        if answer is not None and answer.id == request.id:
            if answer.state is State.REFUSED:
                raise ConfigError(f"{run.root} refuses {request.replicas} replica(s): {answer.lines[-1]}")
            for line in answer.lines[told:]:
                echo(line)
            told = len(answer.lines)
            if answer.state is State.FAILED:
                raise ScaleFailed(f"{run.root} has not {request.replicas} replica(s): {answer.lines[-1]}")
            if answer.state is State.DONE:
                return
        if not alive:
            raise ScaleFailed(f"{run.root} has ended before that was done: verst resume {run.root} rollout.replicas={request.replicas}")
        newest = ScaleRequest.read(run)
        if newest is not None and newest.id != request.id:
            raise ScaleFailed(f"somebody has asked {run.root} for {newest.replicas} replica(s) meanwhile: that counts")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"waited {wait_s:g} s for {run.root} to do that; the wish stays in place: verst watch {run.root}")
        time.sleep(_POLL_S)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
