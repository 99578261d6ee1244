"""Recorded routes: compact, tied to their tokens, refused with the reason, kept over turns, and sent only where they are needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers

from tests.unit.test_roll import END, MORE, PROMPT, ids, roller
from verst.config.algorithms import GrpoConfig
from verst.config.schema import Config
from verst.data.packing import plan_step, samples_of_rank
from verst.errors import ConfigError, RoutesRefused
from verst.journal.codec import decode_routes, encode_routes
from verst.observe.metrics import Tally
from verst.routing.kinds import moe_layers, routed_experts, unread_experts
from verst.routing.records import expert_dtype, narrowed, require_routes, routes_of, tokens_digest
from verst.runtime.actors import LocalWorker
from verst.runtime.batching import assemble, failures, refused
from verst.runtime.pools import Replicas
from verst.runtime.trainer_worker import Scores, TrainerFacts
from verst.runtime.trainers import Trainers
from verst.testing import FakeEngine, FakeEnvironment
from verst.types import NO_VERSION, Batch, Group, RoutedExperts, Routes, RoutesWanted, Sample, Status, Trajectory

KIND = RoutedExperts(layers=2, experts=8, chosen=2)
WIDE = RoutedExperts(layers=1, experts=300, chosen=2)


def sample(index: int, tokens: int = 6, kind: RoutedExperts = KIND, **changes: Any) -> Sample:
    rng = np.random.default_rng(index)
    tokens_T = rng.integers(3, 60, tokens, dtype=np.int32)
    experts = np.argsort(rng.random((tokens - 1, kind.layers, kind.experts)), axis=-1)[..., : kind.chosen]
    mask_T = np.arange(tokens) >= 2
    values: dict[str, Any] = {
        "id": f"{index // 2}/{index % 2}",
        "group": index // 2,
        "tokens_T": tokens_T,
        "loss_mask_T": mask_T,
        "behaviour_logprobs_T": np.zeros(tokens, np.float32),
        "versions_T": np.where(mask_T, 0, NO_VERSION).astype(np.int32),
        "reward": 1.0,
        "routes": routes_of(tokens_T, narrowed(experts, kind)),
    }
    return Sample(**(values | changes))


# ---- what is valid


def test_ids_take_one_byte_up_to_256_experts_and_two_above():
    assert [expert_dtype(n).name for n in (8, 256, 257, 384)] == ["uint8", "uint8", "int16", "int16"]
    wide = narrowed(np.array([[[299, 0]]], np.int32), WIDE)
    assert (wide.dtype, wide.tolist()) == (np.int16, [[[299, 0]]])
    assert narrowed(np.array([[[7, 0], [1, 2]]], np.int64), KIND).nbytes == KIND.layers * KIND.chosen


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros((3, 2)), r"shape \[3, 2\], not \[tokens, 2 layers, 2 experts\]"),
        (np.zeros((3, 1, 2), np.int32), r"shape \[3, 1, 2\]"),
        (np.full((1, 2, 2), 8), "experts 8 to 8, but the model has 0 to 7"),
        (np.full((1, 2, 2), -1), "experts -1 to -1"),
    ],
)
def test_ids_that_no_expert_has_are_refused(experts: np.ndarray, message: str):
    with pytest.raises(RoutesRefused, match=message):
        narrowed(experts, KIND)


def test_routes_must_be_of_the_very_tokens():
    good = sample(0)
    assert good.routes is not None
    require_routes(good, KIND)
    edited = good.tokens_T.copy()
    edited[1] += 1  # a prompt token: no log-probability would tell
    twice = good.routes.experts_TLK.copy()
    twice[3, 1] = 5
    for broken, message in (
        (replace(good, routes=None), "no routes were recorded"),
        (replace(good, routes=Routes(good.routes.experts_TLK[:-1], good.routes.digest)), "routes of 4 tokens, not of the 5"),
        (replace(good, tokens_T=edited), "of other tokens: were they edited"),
        (replace(good, routes=Routes(twice, good.routes.digest)), "routes of token 3 name an expert of layer 1 twice"),
    ):
        with pytest.raises(RoutesRefused, match=message):
            require_routes(broken, KIND)
    demonstration = replace(good, routes=None, versions_T=np.full(6, NO_VERSION, np.int32))
    require_routes(demonstration, KIND)  # nobody sampled it


def test_a_digest_changes_with_any_token():
    tokens_T = np.arange(6, dtype=np.int32)
    others = {tokens_digest(np.where(np.arange(6) == place, 99, tokens_T).astype(np.int32)) for place in range(6)}
    assert len(others | {tokens_digest(tokens_T), tokens_digest(tokens_T[:-1])}) == 8


# ---- recording, turn by turn


def expected_rows(rows: list[tuple[int, int]]) -> list[Any]:
    """`rows`: the number of the request that is to have routed each token."""
    return [FakeEngine.experts(place, number, KIND).tolist() for place, number in rows]


async def test_a_later_turn_adds_rows_and_changes_none():
    engine = FakeEngine([[*ids("41"), END], [*ids("42"), END]], routed_experts=KIND)
    environment = lambda: FakeEnvironment([MORE, replace(MORE, messages=(), done=True)])  # noqa: E731
    (trajectory,) = (await roller(engine, environment, max_turns=2).roll(0, PROMPT)).trajectories
    assert trajectory.routes is not None
    first_end, end = trajectory.turns[0].end, len(trajectory.tokens_T)
    # The last token of a turn is an input only of the next turn's request.
    owners = [(place, 0 if place < first_end - 1 else 1) for place in range(end - 1)]
    assert trajectory.routes.experts_TLK.tolist() == expected_rows(owners)
    assert trajectory.routes.experts_TLK.dtype == np.uint8
    assert [request.routes_from for request in engine.requests] == [0, first_end - 1]
    require_routes(trajectory, KIND)


async def test_an_aborted_turn_keeps_the_rows_that_its_tokens_were_sampled_with():
    plan = [*ids("abcdef"), END]
    opening = len(ids("<|im_start|>user\n6x7?<|im_end|>\n<|im_start|>assistant\n"))
    engine = FakeEngine(lambda request: plan[len(request.tokens_T) - opening :], tick_s=0.005, routed_experts=KIND)
    rolling = asyncio.create_task(roller(engine).roll(0, PROMPT))
    await engine.generated(2)
    await engine.abort()
    (trajectory,) = (await rolling).trajectories
    assert trajectory.routes is not None
    cut = len(engine.requests[1].tokens_T) - 1
    assert trajectory.routes.experts_TLK.tolist() == expected_rows([(p, int(p >= cut)) for p in range(len(trajectory.tokens_T) - 1)])


async def test_a_dense_model_is_asked_for_nothing():
    engine = FakeEngine([[*ids("41"), END]])
    (trajectory,) = (await roller(engine).roll(0, PROMPT)).trajectories
    assert (trajectory.routes, engine.requests[0].routes_from) == (None, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: None, "returned no routes"),
        (lambda rows: rows[1:], r"routes of \d+ tokens with request 0/0/0, not"),
        (lambda rows: rows + 8, "but the model has 0 to 7"),
    ],
)
async def test_routes_that_an_engine_gets_wrong_fail_that_trajectory_only(spoil: Any, message: str):
    engine = FakeEngine([[*ids("41"), END]], routed_experts=KIND)
    generate = engine.generate

    async def spoiled(request: Any) -> Any:
        answer = await generate(request)
        return replace(answer, experts_RLK=spoil(answer.experts_RLK)) if request.id == "0/0/0" else answer

    engine.generate = spoiled  # type: ignore[method-assign]
    bad, good = (await roller(engine, group_size=2).roll(0, PROMPT)).trajectories
    assert (bad.status, good.status) == (Status.FAILED, Status.FINISHED)
    assert bad.error is not None
    with pytest.raises(RoutesRefused, match=message):
        raise RoutesRefused(bad.error)


# ---- on the way to the trainer


def trajectory_of(found: Sample) -> Trajectory:
    arrays = (found.tokens_T, found.loss_mask_T, found.behaviour_logprobs_T, found.versions_T)
    return Trajectory(found.id, *arrays, (), (), Status.FINISHED, 0, reward=1.0, routes=found.routes)


def test_a_sample_without_its_routes_is_refused_and_counted():
    good, bad = trajectory_of(sample(0)), replace(trajectory_of(sample(1)), routes=None)
    group = refused(Group(0, PROMPT, (good, bad), 0), KIND)
    assert [t.status for t in group.trajectories] == [Status.FINISHED, Status.FAILED]
    assert failures([group]) == {"no routes were recorded with its tokens": 1}
    (kept,) = assemble(1, [group], GrpoConfig()).samples
    assert kept.routes is good.routes
    assert refused(Group(0, PROMPT, (good, bad), 0), None).trajectories == (good, bad)


def test_routes_come_back_to_the_bit_and_cost_a_byte_each():
    routes = {3: sample(3, 9).routes, 5: sample(5, 4).routes, 7: sample(7, 4, WIDE).routes}
    encoded = encode_routes({i: found for i, found in routes.items() if found is not None})
    decoded = decode_routes(encoded)
    assert decoded.keys() == routes.keys()
    for index, found in routes.items():
        assert found is not None
        assert decoded[index].digest == found.digest
        assert decoded[index].experts_TLK.dtype == found.experts_TLK.dtype
        np.testing.assert_array_equal(decoded[index].experts_TLK, found.experts_TLK)
        assert not decoded[index].experts_TLK.flags.owndata
    long = {i: sample(i, 1001).routes for i in range(8)}
    size = len(encode_routes({i: found for i, found in long.items() if found is not None}))
    assert size < 1.05 * 8 * 1000 * KIND.layers * KIND.chosen


class Rank(LocalWorker):
    """A trainer rank that keeps the routes it is sent."""

    def __init__(self, wanted: RoutesWanted | None) -> None:
        super().__init__(f"rank that wants {wanted}", None)
        self.sent, self._wanted = b"", wanted

    async def call(self, method: str, /, *args: Any) -> Any:
        if method == "start":
            return TrainerFacts(1, KIND, self._wanted)
        if method == "load_batch":
            self.sent = args[1]
            return Scores(Tally(), {})
        return "tcp://somewhere"

    post = call

    async def stacks(self) -> str:
        return ""

    def kill(self) -> None: ...


async def test_each_rank_receives_the_samples_and_layers_it_needs():
    config = Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}, "train": {"microbatch_tokens": 2048, "ranks": 5}})
    wants = [RoutesWanted(data, 2, layers, packed=True) for data in (0, 1) for layers in ((0,), (1,))]
    ranks = [Rank(wanted) for wanted in (*wants, None)]
    stored: list[bytes] = []
    trainers = Trainers(lambda rank: ranks[rank], config, put=lambda encoded: stored.append(encoded) or encoded)
    await trainers.start()
    assert trainers.routed_experts == KIND
    batch = Batch(1, (0, 1, 2), tuple(sample(i, 4 + i) for i in range(6)))
    await trainers.load_batch(batch)
    plan = plan_step([4 + i for i in range(6)], [0, 0, 1, 1, 2, 2], minibatches=1, epochs=1, ranks=2, microbatch_tokens=2048, packed=True)
    for rank, wanted in zip(ranks, wants, strict=False):
        sent = decode_routes(rank.sent)
        assert tuple(sent) == samples_of_rank(plan, wanted.rank)
        for index, routes in sent.items():
            whole = batch.samples[index].routes
            assert whole is not None
            np.testing.assert_array_equal(routes.experts_TLK, whole.experts_TLK[:, list(wanted.layers)])
            assert routes.digest == whole.digest
    assert ranks[-1].sent is None
    assert len(stored) == 1 + len(wants)


def test_an_engine_that_records_otherwise_is_refused_before_the_first_step():
    replicas = Replicas([], Config.model_validate({"run": {"steps": 1}, "model": {"path": "unused"}}))
    replicas.require_routes(None)
    with pytest.raises(ConfigError, match=r"2 layers, 2 of 8 experts for each token, but the hf engine records none.*train\.routes=ignore"):
        replicas.require_routes(KIND)


# ---- what a config says


@pytest.mark.parametrize(
    ("config", "layers", "kind"),
    [
        (transformers.LlamaConfig(num_hidden_layers=3), (), None),
        (
            transformers.Qwen3MoeConfig(num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[2]),
            (0, 1, 3),
            RoutedExperts(3, 8, 2),
        ),
        (
            transformers.Qwen3MoeConfig(num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=2),
            (1, 3),
            RoutedExperts(2, 8, 2),
        ),
        (
            transformers.DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4),
            (1, 2, 3),
            RoutedExperts(3, 16, 4),
        ),
        (transformers.OlmoeConfig(num_hidden_layers=2, num_experts=64, num_experts_per_tok=8), (0, 1), RoutedExperts(2, 64, 8)),
        (transformers.GptOssConfig(num_hidden_layers=2, num_local_experts=32, num_experts_per_tok=4), (0, 1), RoutedExperts(2, 32, 4)),
    ],
    ids=["llama", "qwen3_moe", "qwen3_moe sparse step", "deepseek_v3", "olmoe", "gpt_oss"],
)
def test_a_config_says_which_layers_route(config: Any, layers: tuple[int, ...], kind: RoutedExperts | None):
    about = config.to_dict()
    assert routed_experts(about) == kind
    assert unread_experts(about) is None
    if kind is not None:
        assert moe_layers(about) == layers


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (transformers.Ernie4_5_MoeConfig(), "moe_k"),
        (transformers.LongcatFlashConfig(), "moe_topk"),
        (transformers.HunYuanMoEV1Config(num_experts=8), "num_experts"),
    ],
    ids=["ernie4_5", "longcat", "hunyuan"],
)
def test_experts_under_other_names_do_not_pass_for_none(config: Any, key: str):
    assert routed_experts(config.to_dict()) is None
    assert unread_experts(config.to_dict()) == key
