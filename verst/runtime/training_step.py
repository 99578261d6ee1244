"""The trainers' part of a step, from its groups to its updates. The loop, `verst replay` and `verst profile` train by what stands here.

The order of the calls is part of what makes bits repeat, so there is one place that has it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from verst.config.scheduled import config_at
from verst.config.schema import Config
from verst.journal.log import JournalReader
from verst.observe.metrics import Tally
from verst.runtime import batching
from verst.runtime.filtering import without
from verst.runtime.trainers import Trainers
from verst.types import Batch, Estimates, Group, RoutedExperts

Phases = Callable[[str], AbstractContextManager[object]]
"""Surrounds each phase of a step, by its name: `load`, `forward_backward`, `optimizer`."""


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """What a step's updates were made with, and what all ranks tell of them."""

    advantages: Estimates
    tally: Tally


def journaled_groups(journal: JournalReader, step: int, routed: RoutedExperts | None) -> list[Group]:
    """Groups as a step trained them; `routed`: how the trainer's model routes, if it replays routes. Raises `JournalError`."""
    record = journal.batch(step)
    return [without(batching.refused(journal.group(seq), routed), record.left_out.get(seq, {})) for seq in record.groups]


async def train_batch(
    trainers: Trainers,
    batch: Batch,
    config: Config,
    phases: Phases,
    *,
    measured: Callable[[dict[str, float]], None] | None = None,
    before_update: Callable[[], Awaitable[None]] | None = None,
) -> TrainedStep:
    """Loads a batch and makes every update of its step.

    `measured` is told the metrics known so far after each backward pass, and may raise in place of the update; `before_update` is awaited
    then.
    """
    config = config_at(config, batch.step)
    with phases("load"):
        scores = await trainers.load_batch(batch)
    signal = batching.signal(batch, config, scores.reference_kl, scores.values)
    tally = Tally().merge(scores.tally).merge(batching.describe_values(scores.values, signal.returns))
    for update in range(trainers.num_updates):
        with phases("forward_backward"):
            tally.merge(await trainers.forward_backward(update, signal.advantages, signal.returns))
        if measured is not None:
            measured(tally.report())
        if before_update is not None:
            await before_update()
        with phases("optimizer"):
            tally.merge(await trainers.optimizer_step(update))
    return TrainedStep(signal.advantages, tally)


async def weights_digest(trainers: Trainers, version: int) -> str:
    """The hash of the trainers' weights, as a commit has it. Writes nothing."""
    return (await trainers.publish(version, None, np.zeros(0, np.int32))).manifest.digest
