"""The trainer of a run without the run, for commands that train journaled steps again: one rank in this process, or all under Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from verst.config.schema import Config
from verst.errors import ConfigError, VerstError
from verst.runtime.actors import LocalWorker, Worker, spawn
from verst.runtime.launch import start_ray, worker_env
from verst.runtime.rundir import RunDirectory
from verst.runtime.shown import Echo
from verst.runtime.trainer_worker import TrainerWorker, rank_worker
from verst.runtime.trainers import Trainers


def device_here() -> str:
    """The GPU, if there is one that PyTorch can use."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@asynccontextmanager
async def rank_here(config: Config, device: str) -> AsyncIterator[Trainers]:
    """One rank in this process, with the run's number of CPU threads."""
    with _threads(config.train.threads):
        worker = LocalWorker("trainer rank 0", TrainerWorker(config, 0, device))
        async with _started(lambda rank: worker, config, lambda value: value) as trainers:
            yield trainers


@asynccontextmanager
async def ranks_under_ray(config: Config, run: RunDirectory, echo: Echo) -> AsyncIterator[Trainers]:
    """Every rank in a process of its own: in the Ray that this process has, else in one that is started here and ends with them.

    Raises `ConfigError` if there are GPUs, but not one for each rank.
    """
    env = worker_env(config.train.threads, run.module_path)
    started = start_ray(run, env, echo)
    import ray

    try:
        device, gpus = _device_of_each(config.train.ranks, int(ray.cluster_resources().get("GPU", 0)))
        given = {} if started else env

        def rank_of(rank: int) -> Worker:
            return spawn(f"trainer rank {rank}", rank_worker, config, rank, device, gpus=gpus, env=given)

        async with _started(rank_of, config, ray.put) as trainers:
            yield trainers
    finally:
        if started:
            ray.shutdown()


@asynccontextmanager
async def _started(spawned: Callable[[int], Worker], config: Config, put: Callable[[Any], Any]) -> AsyncIterator[Trainers]:
    trainers = Trainers(spawned, config, put)
    try:
        await trainers.start()
        yield trainers
    except BaseException:
        with suppress(VerstError):  # of a rank that is the reason
            await trainers.close()
        raise
    await trainers.close()


def _device_of_each(ranks: int, gpus: int) -> tuple[str, float]:
    """The device of each rank, and how many GPUs that is: as `verst.runtime.placement` has it for a run, whose engines are not here."""
    if 0 < gpus < ranks:
        raise ConfigError(f"train.ranks {ranks}: each rank needs a GPU, as in the run, and there are {gpus}; run it where they are")
    return ("cuda", 1.0) if gpus else ("cpu", 0.0)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The run's number of CPU threads, which is part of what makes bits repeat."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
