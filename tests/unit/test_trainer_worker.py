"""A version that trainer rank 0 cannot send: what the other ranks, which are in the same gathers, get to know of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from verst.config.schema import Config
from verst.errors import DeadlineExceeded, InvariantViolation, VerstError
from verst.runtime.trainer_worker import TrainerWorker
from verst.types import Manifest
from verst.weights.files import describe
from verst.weights.group import GroupAddress

RANKS = 2
PROBE_T = np.array([3, 1, 2], np.int32)
WEIGHTS = {f"layer.{i}": torch.full((4,), float(i)) for i in range(3)}


class Gathers:
    """A backend whose collectives are meetings of two threads. `met`: what both came for, each time."""

    def __init__(self) -> None:
        self.met: list[list[str]] = []
        self._came: list[str] = []
        self._barrier = threading.Barrier(RANKS, self._note, timeout=5)

    def _note(self) -> None:
        self.met.append(self._came[:])
        self._came.clear()

    def _meet(self, what: str) -> None:
        self._came.append(what)
        self._barrier.wait()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            self._meet(name)
            yield name, tensor

    def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        self._meet("logprobs")
        return np.zeros(len(tokens_T), np.float32)


class Ranks:
    """Two ranks with a thread each, in which their calls are done one after another, as in their actors."""

    def __init__(self, deadline_s: float = 0.5) -> None:
        self.gathers = Gathers()
        config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "weights": {"deadline_s": deadline_s}})
        self._workers = [TrainerWorker(config, rank, "cpu") for rank in range(RANKS)]
        self._threads = [ThreadPoolExecutor(1) for _ in range(RANKS)]
        for worker in self._workers:
            worker.backend = self.gathers  # pyright: ignore[reportAttributeAccessIssue]
        self.address = self._workers[0].host_group("run/0", 1, shared=True)

    def send(self, manifest: Manifest, address: GroupAddress | None) -> list[Future[Any]]:
        return [thread.submit(worker.send, manifest, PROBE_T, address) for worker, thread in zip(self._workers, self._threads, strict=True)]

    def call_off(self, group: str, version: int) -> None:
        asyncio.run(self._workers[0].call_off(group, version))

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("world", "cut", "error", "message"),
    [(2, False, DeadlineExceeded, "not all of 2 members met"), (1, True, InvariantViolation, "the trainer's next tensor is")],
    ids=["nobody joins", "halfway"],
)
def test_a_version_can_be_sent_again_after_rank_0_failed(ranks: Ranks, world: int, cut: bool, error: type[VerstError], message: str):
    whole = describe(1, iter(WEIGHTS.items()))
    first, *_, last = whole.entries
    failing = ranks.send(replace(whole, entries=(first, last)) if cut else whole, replace(ranks.address, name="run/1", world=world))
    with pytest.raises(error, match=message):
        failing[0].result(10)
    assert failing[1].result(10).tolist() == [0, 0, 0]
    again = ranks.send(whole, replace(ranks.address, name="run/2", world=1))
    assert [future.result(10).tolist() for future in again] == [[0, 0, 0]] * RANKS
    assert ranks.gathers.met == [[what] * RANKS for what in [*WEIGHTS, "logprobs"] * 2]


@pytest.mark.parametrize("begun", [False, True])
def test_a_send_is_called_off_before_it_begins_or_in_the_middle_and_the_next_is_not(begun: bool):
    ranks = Ranks(deadline_s=30.0)
    try:
        whole = describe(1, iter(WEIGHTS.items()))
        calls = [lambda: ranks.call_off("run/1", 1), lambda: ranks.send(whole, replace(ranks.address, name="run/1", world=2))]
        failing = [call() for call in calls[:: -1 if begun else 1]][not begun]
        with pytest.raises(DeadlineExceeded, match=r"not all of 2 members met .* called off"):
            failing[0].result(10)
        assert failing[1].result(10).tolist() == [0, 0, 0]
        again = ranks.send(whole, replace(ranks.address, name="run/2", world=1))
        assert [future.result(10).tolist() for future in again] == [[0, 0, 0]] * RANKS
    finally:
        ranks.close()
