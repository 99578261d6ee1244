"""Bringing a published version into an engine: it serves again only when it provably holds what was published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from verst.errors import DeadlineExceeded, TrainingDiverged, WeightMismatch
from verst.protocols import Engine, WeightUpdate
from verst.types import Manifest, PauseMode

_T = TypeVar("_T")
_NAMED = 5  # tensors a message names


def verify(manifest: Manifest, checksums: Mapping[str, str]) -> None:
    """Compares what an engine says it holds with what was published. Raises `WeightMismatch` that names the tensors."""
    expected = {entry.name: entry.checksum for entry in manifest.entries}
    differing = [
        f"{name} (published {checksum}, engine {checksums[name]})"
        for name, checksum in expected.items()
        if name in checksums and checksums[name] != checksum
    ]
    problems = [
        _list("different", differing),
        _list("missing in the engine", [name for name in expected if name not in checksums]),
        _list("unknown to the trainer", [name for name in checksums if name not in expected]),
    ]
    if any(problems):
        raise WeightMismatch(f"weights of version {manifest.version}: " + "; ".join(problem for problem in problems if problem))


async def push(
    engine: Engine,
    update: WeightUpdate,
    *,
    deadline_s: float,
    probe_T: NDArray[np.int32] | None = None,
    in_flight: PauseMode = PauseMode.IN_PLACE,
) -> NDArray[np.float32] | None:
    """Pauses the engine, loads and verifies the update, resumes it, and returns its log-probabilities `[T]` of the probe, if there is one.

    `deadline_s` limits the whole. The probe comes after the resumption, so that nobody waits for it: what the engine generates before its
    verdict (`check_probe`) must be held back. What is raised before, `WeightMismatch` (push the version again, whole), `DeadlineExceeded`
    naming what was awaited, or what the engine raised, leaves the engine paused.
    """
    version = update.manifest.version
    wait = _Budget(deadline_s)
    await wait.until(engine.pause(in_flight), f"the engine to pause for version {version}")
    verify(update.manifest, await wait.until(engine.update_weights(update), f"the engine to load version {version}"))
    await wait.until(engine.resume(), f"the engine to resume with version {version}")
    if probe_T is None:
        return None
    return await wait.until(engine.logprobs(probe_T), f"the probe of version {version}")


def compare_probe(trainer_logprobs_T: NDArray[np.float32], engine_logprobs_T: NDArray[np.float32]) -> float:
    """Mean |trainer − engine| over the tokens that were scored (all but the first); NaN if any is not finite.

    The mean, not the largest: in bfloat16 one unlikely token of a sound model may differ by 0.2 where the mean is 0.01.
    Raises `ValueError` if the lengths differ.
    """
    if trainer_logprobs_T.shape != engine_logprobs_T.shape:
        raise ValueError(f"probe: {trainer_logprobs_T.shape} trainer against {engine_logprobs_T.shape} engine log-probabilities")
    if not (np.isfinite(trainer_logprobs_T).all() and np.isfinite(engine_logprobs_T).all()):
        return float("nan")
    differences_T = np.abs(trainer_logprobs_T.astype(np.float64) - engine_logprobs_T)[1:]
    return float(differences_T.mean()) if len(differences_T) else 0.0


def check_probe(difference: float, limit: float, version: int) -> None:
    """Raises `TrainingDiverged` if `compare_probe` found more than `limit` (weights.probe_limit), or something not finite."""
    if not difference <= limit:  # written so that NaN fails
        raise TrainingDiverged(
            f"version {version}: trainer and engine disagree by {difference:.4g} on average about the probe's log-probabilities, "
            f"the limit is {limit:g} (weights.probe_limit). They hold the same weights, so one of them computes something else: "
            "compare dtype and attention"
        )


@dataclass
class _Budget:
    """One deadline over several waits."""

    deadline_s: float
    _start_s: float = field(default_factory=time.monotonic)

    async def until(self, awaitable: Awaitable[_T], what: str) -> _T:
        limit = asyncio.timeout(self.deadline_s - (time.monotonic() - self._start_s))
        try:
            async with limit:
                return await awaitable
        except TimeoutError as error:
            if not limit.expired():  # a timeout of the awaited thing itself is its own error
                raise
            raise DeadlineExceeded(f"waited for {what}: not done within the {self.deadline_s:g} s of the push") from error


def _list(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:_NAMED])}{more}"
