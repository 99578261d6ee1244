"""Which GPU each role gets, and that Ray puts a rank and its replicas on the same one."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from verst.config.schema import Config
from verst.errors import ConfigError, DeadlineExceeded
from verst.runtime.actors import spawn
from verst.runtime.bundles import reserve
from verst.runtime.placement import Placement, place


def config(ranks: int, replicas: int, **weights: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": "unused"},
            "train": {"ranks": ranks},
            "rollout": {"replicas": replicas},
            "weights": weights,
        }
    )


@pytest.mark.parametrize(
    ("ranks", "replicas", "gpus", "expected"),
    [
        (2, 3, 0, Placement(0, 0)),
        (2, 3, 5, Placement(1, 1)),
        (2, 3, 9, Placement(1, 1)),
        (1, 1, 1, Placement(1 / 2, 1 / 2, shared=True)),
        (1, 3, 1, Placement(1 / 4, 1 / 4, shared=True)),
        (2, 2, 2, Placement(1 / 2, 1 / 2, shared=True)),
        (2, 4, 2, Placement(1 / 3, 1 / 3, shared=True)),
    ],
)
def test_gpus_of_their_own_or_shared_with_a_rank(ranks: int, replicas: int, gpus: int, expected: Placement):
    assert place(config(ranks, replicas), gpus) == expected


@pytest.mark.parametrize(("ranks", "replicas", "gpus"), [(2, 2, 3), (2, 3, 2), (4, 2, 4), (2, 1, 1)])
def test_gpus_that_cannot_be_shared_equally_are_too_few(ranks: int, replicas: int, gpus: int):
    with pytest.raises(ConfigError, match=rf"train\.ranks \({ranks}\) and rollout\.replicas \({replicas}\) need {ranks + replicas} GPUs"):
        place(config(ranks, replicas), gpus)


def test_a_reward_has_gpus_that_nobody_else_has():
    given = {"run": {"steps": 1}, "model": {"path": "unused"}, "reward": {"actor_gpus": 0.5}}
    one = Config.model_validate(given)
    assert place(one, 3) == Placement(1, 1)
    assert place(one, 2) == Placement(1 / 2, 1 / 2, shared=True)
    with pytest.raises(ConfigError, match=r"need 2 GPUs, there are 0 beside 1 of the reward"):
        place(one, 1)
    with pytest.raises(ConfigError, match=r"reward\.actor_gpus needs 1 GPU\(s\), there are 0"):
        place(one, 0)
    assert place(Config.model_validate(given | {"reward": {"actor_gpus": 0}}), 0) == Placement(0, 0)


def test_transports_that_need_gpus_of_their_own_are_refused():
    for ranks, transport in ((1, "group"), (2, "group"), (2, "shared")):
        with pytest.raises(ConfigError, match=rf"weights\.transport {transport} does not work"):
            place(config(ranks, ranks, transport=transport), ranks)
    assert place(config(1, 1, transport="shared"), 1).shared
    assert place(config(2, 2, transport="file"), 2).shared


class Tells:
    """Says which GPU its process was given."""

    def gpu(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture
def two_gpus() -> Iterator[None]:
    """Ray with two GPUs that nobody looks at."""
    import ray

    ray.init("local", num_gpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of sockets of its own
@pytest.mark.usefixtures("two_gpus")
async def test_a_rank_and_its_replicas_are_on_the_same_gpu():
    placement = place(config(2, 4), 2)
    async with contextlib.AsyncExitStack() as opened:
        on = await reserve(placement, 2, opened, deadline_s=30)
        workers = [spawn(f"{n}", Tells, gpus=placement.trainer_gpus, **on[n % 2]) for n in (0, 1, 0, 1, 0, 1)]
        gpus = [await worker.call("gpu") for worker in workers]
        assert gpus == gpus[:2] * 3
        assert Counter(gpus) == {"0": 3, "1": 3}
        with pytest.raises(DeadlineExceeded, match="Ray to give 1 whole GPUs"):
            await reserve(place(config(1, 1), 1), 1, opened, deadline_s=0.5)
        for worker in workers:
            worker.kill()
    async with contextlib.AsyncExitStack() as opened:  # given back
        await reserve(placement, 2, opened, deadline_s=30)
    assert await reserve(Placement(0, 0, shared=True), 2, opened, 1) == [{}, {}]
