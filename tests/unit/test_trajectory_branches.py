"""A trajectory whose agent's conversation branched, from the journal to the trained step. Numbers are worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.unit.fsdp_cases import BATCHES, branched, largest_difference, make_backend, make_config, path, train, weights_of
from tests.unit.test_codec import assert_same
from verst.algorithms.losses import TEACHER, dpo_loss
from verst.config.algorithms import DpoConfig
from verst.config.load import load_config
from verst.errors import ExtensionError, RewardFailure
from verst.fields import Opaque, PerSample, PerToken, Score
from verst.filters.shipped import Duplicates, Length
from verst.journal.audit import _oldest_version
from verst.journal.codec import decode_batch, decode_group, encode_batch, encode_group
from verst.journal.query import Found
from verst.observe.recorded import GroupLife
from verst.observe.timeline import _lived
from verst.rewards.worker import _scored
from verst.rollout.teacher import Teacher
from verst.routing.records import routes_of
from verst.runtime.batching import advantages, assemble, describe, refused, signal
from verst.runtime.bias import Bias
from verst.runtime.filtering import _light
from verst.testing import FakeEngine
from verst.training.step import plan_batch
from verst.types import NO_VERSION, Batch, Branch, FinishReason, Group, Message, Prompt, RoutedExperts, Sample, Status, Trajectory, Turn

__all__ = ["path"]  # a fixture

KIND = RoutedExperts(layers=1, experts=4, chosen=1)


def sequence(mask: str, *, version: int = 0, first: int = 3) -> dict[str, Any]:
    """Token arrays: `x` was sampled, with log-probabilities −1, −2 … and by this version; `.` was given. Tokens count from `first`."""
    mask_T = np.array([letter == "x" for letter in mask])
    tokens_T = np.arange(first, first + len(mask), dtype=np.int32)
    starts = np.flatnonzero(mask_T & ~np.append(False, mask_T[:-1]))
    ends = np.flatnonzero(mask_T & ~np.append(mask_T[1:], False)) + 1
    places = zip([0, *ends[:-1].tolist()], starts.tolist(), ends.tolist(), strict=True)
    return {
        "tokens_T": tokens_T,
        "loss_mask_T": mask_T,
        "logprobs_T": np.where(mask_T, -np.cumsum(mask_T), 0).astype(np.float32),
        "versions_T": np.where(mask_T, version, NO_VERSION).astype(np.int32),
        "turns": tuple(Turn(start, generated, end, FinishReason.STOP, mask) for start, generated, end in places),
        "messages": (Message("user", f"ask {mask}"), Message("assistant", f"say {mask}")),
        "routes": routes_of(tokens_T, np.arange(len(mask) - 1, dtype=np.uint8)[:, None, None] % 4),
    }


def trajectory(name: str, reward: float, mask: str, *others: str, **changes: Any) -> Trajectory:
    """`others` are the branches. Their versions are 1, 2 … and their tokens begin at 13, 23 …"""
    branches = tuple(Branch(**sequence(other, version=i, first=3 + 10 * i)) for i, other in enumerate(others, 1))
    values = sequence(mask) | {"status": Status.FINISHED, "seed": 1, "branches": branches}
    return Trajectory(id=name, reward=reward, **(values | changes))


def group_of(*members: Trajectory, seq: int = 0) -> Group:
    return Group(seq, Prompt("p", (Message("user", "q"),)), members, admitted_version=0)


def two() -> Group:
    """Rewards 3 and 1: the first has an answer of two tokens, and branches of one token and of three."""
    fields = {"each": PerToken([1, 2, 3, 4, 5, 6]), "all": PerSample(0.5), "why": Opaque("x")}
    return group_of(trajectory("0/0", 3.0, "..xx", "...x", ".xxx", fields=fields), trajectory("0/1", 1.0, "..x", fields={}))


def config(name: str, **options: Any) -> Any:
    return load_config(
        {"run": {"steps": 9}, "model": {"path": "m"}, "rollout": {"max_new_tokens": 8}, "algorithm": {"name": name, **options}}
    )


def batch_of(group: Group, chosen: Any) -> Batch:
    return assemble(1, [group], chosen.algorithm)


# ---- in the journal


def test_group_and_batch_keep_branches_to_the_bit():
    group = two()
    assert_same(decode_group(encode_group(group)), group)
    batch = batch_of(group, config("grpo"))
    without_routes = replace(batch, samples=tuple(replace(sample, routes=None) for sample in batch.samples))
    assert_same(decode_batch(encode_batch(batch)), without_routes)


def test_who_looks_at_tokens_sees_those_of_all_branches():
    group = two()
    found = Found(group, group.trajectories[0], None, None)
    assert found.mean_logprob == pytest.approx(-(1 + 2 + 1 + 1 + 2 + 3) / 6)
    assert found.versions == (0, 2)
    described = found.described()
    assert [m["content"] for m in described["messages"]] == ["ask ..xx", "say ..xx"]
    assert [branch["messages"][1]["content"] for branch in described["branches"]] == ["say ...x", "say .xxx"]
    assert [(branch["tokens"], branch["turns"][0]["generated_tokens"]) for branch in described["branches"]] == [(4, 1), (4, 3)]
    late = group_of(trajectory("0/0", 1.0, "..x", "..x", versions_T=np.array([-1, -1, 5], np.int32)))
    assert _oldest_version(encode_group(late)) == 1  # of the branch


def test_the_newest_version_of_a_group_may_be_that_of_a_branch():
    life = GroupLife(0, "p", 0, posted=0, began=0, scoring=0, ended=0, tokens=0, oldest=0, newest=0)
    assert _lived(life, two(), 1.0)[-3:] == (7, 0, 2)  # tokens, oldest, newest


def test_a_group_that_filters_see_has_no_routes_anywhere():
    light = _light(two())
    assert all(one.routes is None for member in light.trajectories for one in member.sequences)
    assert len(light.trajectories[0].branches) == 2


# ---- before it is trained


def test_routes_of_a_branch_are_checked_too():
    group = two()
    assert refused(group, KIND).trainable == group.trajectories
    first, second = group.trajectories
    bad = replace(first, branches=(first.branches[0], replace(first.branches[1], routes=None)))
    found = refused(replace(group, trajectories=(bad, second)), KIND)
    assert [t.error for t in found.trajectories] == ["no routes were recorded with its tokens", None]


def test_shipped_filters_count_and_compare_all_branches():
    assert Length(max_tokens=5)(two()) == {0: "more than 5 tokens"}
    assert Length(max_tokens=6)(two()) == {}
    same, other = trajectory("0/0", 0.0, "..x", "..x"), trajectory("0/1", 0.0, "..x", "..xx")
    assert Duplicates(limit=0.0)(group_of(same, other)) is None
    assert Duplicates(limit=0.0)(group_of(same, replace(same, id="0/1"))) is not None


async def test_the_teacher_is_asked_about_each_sequence():
    (judged, _) = (
        await Teacher(FakeEngine([[1]])).judge(group_of(trajectory("0/0", 0.0, "..xx", ".x"), trajectory("0/1", 0.0, ".x")))
    ).trajectories
    said = [FakeEngine.logprob(token) for token in (5, 6, 14)]
    assert judged.fields == {TEACHER: PerToken(said)}


def test_a_reward_gives_a_value_for_each_loss_token_of_all_branches():
    of = two().trajectories[1:] + two().trajectories[:1]
    plain, with_branches = (replace(one, fields={}) for one in of)
    assert _scored(Score(1.0, {"x": PerToken([1])}), plain).fields == {"x": PerToken([1])}
    assert _scored(Score(1.0, {"x": PerToken(range(6))}), with_branches).fields == {"x": PerToken(range(6))}
    with pytest.raises(RewardFailure, match="field 'x' is PerToken with 2 values, not 6"):
        _scored(Score(1.0, {"x": PerToken([1, 2])}), with_branches)


# ---- as samples


def test_each_sequence_is_a_sample_with_its_part_of_the_fields():
    batch = batch_of(two(), config("grpo"))
    assert [(s.id, s.branch, s.group, s.reward) for s in batch.samples] == [
        ("0/0", 0, 0, 3.0),
        ("0/0", 1, 0, 3.0),
        ("0/0", 2, 0, 3.0),
        ("0/1", 0, 0, 1.0),
    ]
    assert batch.trajectories.tolist() == [0, 0, 0, 1]
    assert [s.tokens_T.tolist() for s in batch.samples] == [[3, 4, 5, 6], [13, 14, 15, 16], [23, 24, 25, 26], [3, 4, 5]]
    first, second = two().trajectories
    for sample, one in zip(batch.samples, (*first.sequences, second), strict=True):
        assert_same(sample.routes, one.routes)
    whole = {"all": PerSample(0.5), "why": Opaque("x")}
    assert [s.fields for s in batch.samples] == [
        {"each": PerToken([1, 2]), **whole},
        {"each": PerToken([3]), **whole},
        {"each": PerToken([4, 5, 6]), **whole},
        {},
    ]


@pytest.mark.parametrize("count", [5, 7])
def test_values_that_are_not_one_for_each_token_are_refused(count: int):
    group = group_of(trajectory("0/0", 1.0, "..xx", "...x", ".xxx", fields={"each": PerToken(range(count))}))
    with pytest.raises(ExtensionError, match=rf"sample 0/0: field 'each' is PerToken with {count - 3} values, not 3"):
        assemble(1, [group], config("grpo").algorithm)


def test_what_a_batch_was_like():
    told = describe([two()], [1.0, 1.0, 1.0, -1.0], version=2)
    assert told["reward"] == 2.0  # of two trajectories, not of four sequences
    assert told["rollout/branches"] == 1.0
    assert told["rollout/generated_tokens"] == 3.5
    assert told["rollout/turns"] == 2.0  # three answers and one
    assert (told["staleness/max"], told["staleness/mean"]) == (2.0, 2.0)
    assert Bias().trained([two()], 2)["bias/age"] == 0.0


def test_an_answer_that_conversations_share_is_one_turn():
    shared = trajectory("0/0", 1.0, "..xx..x")
    alike = sequence("..xx..x", first=3)
    again = alike | {"loss_mask_T": np.array([False] * 6 + [True]), "versions_T": np.array([-1] * 6 + [0], np.int32)}
    told = describe([group_of(replace(shared, branches=(Branch(**again),)))], [1.0], version=0)
    assert told["rollout/turns"] == 3.0


# ---- advantages


@pytest.mark.parametrize(("name", "expected"), [("dr_grpo", [1, 1, 1, -1]), ("rloo", [2, 2, 2, -2])])
def test_a_baseline_counts_trajectories(name: str, expected: list[float]):
    """Of rewards 3 and 1 the mean is 2. Had sequences been counted it were 2.5."""
    chosen = config(name)
    assert advantages(batch_of(two(), chosen), chosen, {}) == expected


def test_the_deviation_of_a_batch_is_that_of_its_trajectories():
    chosen = config("reinforce_plus_plus")
    found = advantages(batch_of(two(), chosen), chosen, {})
    assert found == pytest.approx([0.5**0.5] * 3 + [-(0.5**0.5)], abs=1e-5)  # deviation √2, with the divisor n − 1


def test_length_and_kl_are_those_of_all_branches():
    """3 − 0.5 · (1 + 2 + 4) = −0.5 and 1 − 0.5 · 2 = 0; of at most 8 tokens the first has 6, whose punishment is (0.75 − 0.5) / 0.5."""
    chosen = config("dr_grpo", kl_coefficient=0.5, kl_in="reward", overlong_share=0.5)
    found = advantages(batch_of(two(), chosen), chosen, {0: 1.0, 2: 4.0, 1: 2.0, 3: 2.0})
    assert found == pytest.approx([-0.5, -0.5, -0.5, 0.5])


def of_the_reward(rewards_N: NDArray[np.float64], groups_N: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.float64]:
    assert [sample.branch for sample in samples] == [0] * len(rewards_N)
    return 10 * rewards_N + groups_N + [float(sample.loss_mask_T.sum()) for sample in samples]


def test_a_users_function_sees_each_trajectory_once():
    chosen = config("grpo", advantages=f"{__name__}:of_the_reward")
    assert advantages(batch_of(two(), chosen), chosen, {}) == [32.0, 32.0, 32.0, 11.0]


def test_each_sequence_ends_with_the_reward_for_a_critic():
    """γ and λ are 1: a return is the reward less nothing, wherever the token stands, and the advantage is it less the value."""
    chosen = config("ppo", gamma=1.0, gae_lambda=1.0, normalize_advantages=False)
    values = {0: np.array([1, 2], np.float32), 1: np.zeros(1, np.float32), 2: np.array([0, 1, 4], np.float32), 3: np.ones(1, np.float32)}
    found = signal(batch_of(two(), chosen), chosen, {}, values)
    assert [np.asarray(own).tolist() for own in found.advantages] == [[2, 1], [3], [3, 2, -1], [0]]
    assert [own.tolist() for own in found.returns] == [[3, 3], [3], [3, 3, 3], [1]]


def test_a_pair_is_of_trajectories():
    best, worst = trajectory("0/0", 3.0, "..x", ".x"), trajectory("0/2", 0.0, ".xx", "..x", ".x")
    chosen = config("online_dpo")
    batch = batch_of(group_of(best, trajectory("0/1", 1.0, ".x", ".x"), worst), chosen)
    assert [(s.id, s.branch) for s in batch.samples] == [("0/0", 0), ("0/0", 1), ("0/2", 0), ("0/2", 1), ("0/2", 2)]
    assert advantages(batch, chosen, {}) == [1, 1, -1, -1, -1]


# ---- in the loss


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("token_mean", [[1 / 7] * 2, [1 / 7], [1 / 7] * 3, [1 / 7]]),
        ("sequence_mean", [[1 / 12] * 2, [1 / 12], [1 / 12] * 3, [1 / 2]]),  # two trajectories, the first of six tokens
        ("constant", [[1 / 16] * 2, [1 / 16], [1 / 16] * 3, [1 / 16]]),  # two trajectories, each of 8 tokens at most
    ],
)
def test_weights_of_a_loaded_step(aggregate: str, expected: list[list[float]]):
    chosen = config("grpo", aggregate=aggregate)
    weights = plan_batch(chosen, batch_of(two(), chosen), 0, 1, torch.device("cpu")).weights(0)
    for index, of_sample in enumerate(expected):
        np.testing.assert_allclose(weights[index], of_sample, rtol=1e-6)


def test_both_trajectories_of_a_pair_are_summed_with_their_branches():
    """beta 0.5: r(chosen) = 0.5 · (1 + 0.5) and r(rejected) = 0.5 · (−1): the loss is log(1 + exp(−1.25)) = 0.251929 on every token."""
    chosen = config("online_dpo", beta=0.5)
    batch = batch_of(group_of(trajectory("0/0", 1.0, "..x", ".x"), trajectory("0/1", 0.0, ".x")), chosen)
    step = plan_batch(chosen, batch, 0, 1, torch.device("cpu"))
    ((first,),) = step.plan.updates[0].ranks
    assert set(first) == {0, 1, 2}, "a microbatch has all of the pair"
    (microbatch,) = step.microbatches(0)
    reference = {0: -2.0, 1: -1.5, 2: 0.0}
    step.reference = {index: np.array([value], np.float32) for index, value in reference.items()}
    inputs = step.inputs(microbatch, torch.full((3,), -1.0), advantages(batch, chosen, {}))
    output = dpo_loss(inputs, DpoConfig(beta=0.5))
    assert output.per_token.tolist() == pytest.approx([0.251929] * 3, abs=1e-6)
    assert output.pair_metrics["reward_margin"].tolist() == pytest.approx([1.25])
    weights = step.weights(0)
    assert [weights[i].tolist() for i in range(3)] == [[0.25], [0.25], [0.5]]


@pytest.mark.parametrize(
    ("algorithm", "microbatch_tokens", "samples"),
    [
        ({"name": "gspo", "kl_coefficient": 0.1, "kl_in": "reward"}, 12, 8),
        ({"name": "dr_grpo"}, 12, 8),
        ({"name": "online_dpo"}, 44, 7),  # of the second group the first two trajectories, which are a pair
    ],
)
def test_how_branches_are_divided_does_not_change_what_is_trained(
    path: str, algorithm: dict[str, Any], microbatch_tokens: int, samples: int
):
    batches = [replace(one, samples=one.samples[:samples]) for one in map(branched, BATCHES)]
    found = []
    for tokens in (200, microbatch_tokens):
        chosen = make_config(path, algorithm=algorithm, train={"microbatch_tokens": tokens})
        backend = make_backend(chosen)
        start = weights_of(backend)
        train(backend, chosen, batches)
        found.append(weights_of(backend))
        assert largest_difference(start, found[-1]) > 0.01
    assert largest_difference(*found) < 5e-5  # see test_fsdp_ranks
