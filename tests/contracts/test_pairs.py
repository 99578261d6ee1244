"""Routing replay (R3) over every pair of engine and backend: the trainer sees what the engine sampled, and the engine what was trained.

All in one process but for SGLang's server, and by the parts that a run is made of: groups are rolled, assembled, delivered, trained and
pushed as the loop does. A dense model goes through the same code and has no routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contracts.engine_cases import DENSE, MAX_TOKENS, SERVED, SGLANG, hf_engine, opening, words
from tests.stack.megatron_cases import make_megatron
from tests.unit.fsdp_cases import make_backend, make_config
from verst.config.schema import Config
from verst.data.chat import ChatRenderer
from verst.observe.metrics import Tally
from verst.protocols import Engine, TrainBackend
from verst.rollout.roll import GroupRoller
from verst.routing.records import routes_of
from verst.runtime.batching import advantages, assemble, routes_for
from verst.testing import FakeEnvironment
from verst.training.distributed import leave_distributed
from verst.types import NO_VERSION, Batch, FinishReason, GenerateRequest, Generation, Group, Message, Prompt, Reply, Sampling
from verst.weights.files import FileUpdate, publish
from verst.weights.push import compare_probe, push

BACKENDS: Mapping[str, Callable[[Config], TrainBackend]] = {"fsdp": make_backend, "megatron": make_megatron}
MODELS = {"routed": 3, DENSE: 0}
"""A Mixture of Experts and a dense model, with the number of their layers that route."""
LIMIT = 1e-5  # of one side's log-probability, in float32, from the exact one
MEAN_LIMIT = 2e-6  # of the difference of two over some hundred tokens: 0.7 to 1.0e-6, by what is sampled; with shifted routes above 0.05
GROUP_SIZE, LONG_TOKENS = 3, 90
TURNS = partial(FakeEnvironment, [Reply((Message("user", f" w{5 + n} w6 w7 "),), done=False) for n in range(3)])


@dataclass
class Heard:
    """An engine, and what it answered."""

    engine: Engine
    answers: list[Generation] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> Generation:
        self.answers.append(await self.engine.generate(request))
        return self.answers[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@dataclass
class Pair:
    engine: Engine
    backend: TrainBackend
    config: Config

    def roller(self, **changes: Any) -> GroupRoller:
        """Of up to three turns: a token in four ends one."""
        return GroupRoller(
            self.engine,
            ChatRenderer(words(eos_token="w63")),
            TURNS,
            Sampling(max_new_tokens=24, stop_token_ids=tuple(range(16))),
            group_size=GROUP_SIZE,
            max_turns=3,
            max_prompt_tokens=16,
            max_model_tokens=MAX_TOKENS,
            seed=7,
            environment_deadline_s=5.0,
            **changes,
        )

    async def batch(self) -> Batch:
        """Three groups of several turns, and one whose generations were aborted from outside and continued."""
        step = self.engine.version + 1
        prompts = [Prompt(f"p:{n}", (Message("user", " ".join(f"w{token}" for token in range(n, n + 5))),)) for n in range(4)]
        groups = [await self.roller().roll(4 * step + n, prompts[n]) for n in range(3)]
        assert any(len(trajectory.turns) > 1 for group in groups for trajectory in group.trajectories)
        groups.append(await self.interrupted(4 * step + 3, prompts[3]))
        return assemble(step, [rewarded(group) for group in groups], self.config.algorithm)

    async def interrupted(self, seq: int, prompt: Prompt) -> Group:
        """Rolls it again if all of its generations ended by themselves before the first abort, or none had a token."""
        for _ in range(20):
            heard = Heard(self.engine)
            long = replace(self.roller(), engine=heard, sampling=Sampling(LONG_TOKENS), max_turns=1)
            rolling = asyncio.ensure_future(long.roll(seq, prompt))
            for n in count(1):  # later and later, so that some have tokens by then and all come to an end
                if (await asyncio.wait([rolling], timeout=0.03 * n))[0]:
                    break
                await self.engine.abort()
            if any(len(answer.tokens_T) for answer in heard.answers if answer.finish is FinishReason.ABORT):
                return rolling.result()
        raise AssertionError("no abort found a generation in flight")

    def scored(self, batch: Batch) -> Tally:
        """What the trainer finds when it loads the batch, with the routes that it asked for."""
        wanted = self.backend.routes_wanted
        own = {} if wanted is None else routes_for(batch, wanted, self.config)
        delivered = replace(batch, samples=tuple(replace(sample, routes=own.get(i)) for i, sample in enumerate(batch.samples)))
        return Tally().merge(self.backend.load_batch(delivered).tally)

    def updated(self, batch: Batch) -> Tally:
        """The updates of the step, once the batch is loaded."""
        tally, advantages_ = Tally(), advantages(batch, self.config, {})
        for update in range(self.backend.num_updates):
            tally.merge(self.backend.forward_backward(update, advantages_))
            tally.merge(self.backend.optimizer_step(update))
        return tally


def rewarded(group: Group) -> Group:
    return replace(group, trajectories=tuple(replace(t, reward=float(n)) for n, t in enumerate(group.trajectories)))


@pytest.fixture(scope="module", params=BACKENDS)
def make_trainer(request: pytest.FixtureRequest) -> Iterator[Callable[[Config], TrainBackend]]:
    yield BACKENDS[request.param]
    leave_distributed()  # Megatron makes a group even of one rank


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SERVED)
async def engine(
    request: pytest.FixtureRequest, model: str, models: Callable[[str], Path], servers: Callable[[str], Any]
) -> AsyncIterator[Engine]:
    """At version 3, with the model's own weights."""
    if request.param == SGLANG:
        from tests.contracts.sglang_server import attached

        async with attached(servers(model), record_routes=True) as made:
            yield made
    else:
        async with opening(partial(hf_engine, version=3, record_routes=True), models) as start:
            yield await start(model)


@pytest.fixture
def pair(engine: Engine, make_trainer: Callable[[Config], TrainBackend], model: str, models: Callable[[str], Path]) -> Pair:
    config = make_config(
        str(models(model)),
        data={"max_prompt_tokens": 16},
        rollout={"group_size": GROUP_SIZE, "temperature": 1.0, "max_new_tokens": LONG_TOKENS},
        train={"microbatch_tokens": 320, "minibatches": 2, "lr": 1e-3},  # two updates, so the batch is scored before the first
    )
    return Pair(engine, make_trainer(config), config)


def assert_agreement(tally: Tally, batch: Batch, layers: int) -> None:
    """Every token's log-probability is the engine's, and every token went through the recorded experts in every layer that routes."""
    report = tally.report()
    assert report["mismatch/abs_max"] <= 2 * LIMIT  # both round; which token does so most depends on the processor
    assert report["mismatch/abs_mean"] <= MEAN_LIMIT
    assert tally.weights["mismatch/abs_mean"] == sum(int(sample.loss_mask_T.sum()) for sample in batch.samples)
    routed = layers * sum(len(sample.tokens_T) - 1 for sample in batch.samples)
    assert tally.weights.get("routes/replayed", 0) == routed
    assert report.get("routes/replayed") == (1.0 if layers else None)


async def test_engine_and_trainer_agree_before_an_update_and_after_it(pair: Pair, model: str, tmp_path: Path) -> None:
    probe_T = np.arange(3, 43, dtype=np.int32)
    for version in (4, 5):
        batch = await pair.batch()
        assert {int(v) for sample in batch.samples for v in sample.versions_T} == {NO_VERSION, version - 1}
        assert_agreement(pair.scored(batch), batch, MODELS[model])
        before_T = pair.backend.logprobs(probe_T)
        assert pair.updated(batch).report()["update/skipped"] == 0
        after_T = pair.backend.logprobs(probe_T)
        assert np.abs(after_T - before_T).max() > 1e-3
        update = FileUpdate(publish(version, pair.backend.weights(), tmp_path))
        await push(pair.engine, update, deadline_s=60)  # which verifies every tensor's checksum
        assert pair.engine.version == version
        assert compare_probe(after_T, await pair.engine.logprobs(probe_T)) <= LIMIT
    last = await pair.batch()
    assert_agreement(pair.scored(last), last, MODELS[model])


@pytest.mark.parametrize("model", ["routed"])
async def test_routes_of_the_token_before_are_noticed(pair: Pair) -> None:
    batch = await pair.batch()
    shifted = [
        replace(s, routes=routes_of(s.tokens_T, np.roll(s.routes.experts_TLK, 1, axis=0))) for s in batch.samples if s.routes is not None
    ]
    assert len(shifted) == len(batch.samples)
    right, wrong = pair.scored(batch), pair.scored(replace(batch, samples=tuple(shifted)))
    assert_agreement(right, batch, 3)
    assert right.report()["routes/differ"] <= 0.01  # rounding may turn a choice between two equal scores
    assert wrong.report()["routes/replayed"] == 1.0  # they are replayed all the same
    assert wrong.report()["routes/differ"] > 0.3
    assert wrong.report()["mismatch/abs_mean"] > 1000 * right.report()["mismatch/abs_mean"]
    assert wrong.report()["mismatch/abs_mean"] > 0.05
