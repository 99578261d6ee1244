"""Fields of a user's own: what may enter, and that it arrives in the loss bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.field_cases import expected, fields_batch, fields_config, run_steps, seeing_loss, with_fields
from tests.unit.fsdp_cases import make_backend, make_batch
from tests.unit.fsdp_cases import path as path
from tests.unit.test_codec import assert_same, group_of, trajectory
from tests.unit.test_roll import END, MORE, PROMPT, ids, roller
from verst.algorithms.losses import LossInputs
from verst.config.algorithms import GrpoConfig
from verst.errors import EnvironmentFailure, ExtensionError, RewardFailure
from verst.fields import MAX_FIELDS, Opaque, PerSample, PerToken, Score, checked, from_json, to_json
from verst.journal import codec
from verst.journal.codec import decode_batch, decode_group, encode_batch, encode_group
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.runtime.batching import assemble
from verst.testing import FakeEngine, FakeEnvironment, check_loss
from verst.training.fields import loss_fields
from verst.training.microbatch import collate
from verst.types import Group, Reply, Status

CPU = torch.device("cpu")
DEEP: list[Any] = []
for _ in range(10_000):
    DEEP = [DEEP]


# ---- what may enter


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"x": PerToken([1.0, 2.0])}, r"its reply: field 'x' is PerToken with 2 values, not 3: one for each generated token"),
        ({"x": PerToken([1.0, float("nan"), 1.0])}, "field 'x' is PerToken with nan at place 1: give finite numbers"),
        ({"x": PerToken([1.0, 1e300, 1.0])}, "field 'x' is PerToken with inf at place 1"),
        ({"x": PerToken([[1.0, 2.0, 3.0]])}, r"field 'x' is PerToken with an array of shape \[1, 3\], not a list of numbers"),
        ({"x": PerToken(1.0)}, r"of shape \[\], not a list"),
        ({"x": PerSample(float("inf"))}, "field 'x' is PerSample with inf: give a finite number"),
        ({"x": PerSample(1e39)}, "field 'x' is PerSample with 1e\\+39: give a finite number of float32"),
        ({"x": PerSample("much")}, "field 'x' is PerSample with 'much'"),  # type: ignore[arg-type]
        ({"x": Opaque({"a": {1, 2}})}, "field 'x' is Opaque with a value that is not JSON: Object of type set"),
        ({"x": Opaque([float("nan")])}, "field 'x' is Opaque with a value that is not JSON"),
        ({"x": Opaque(DEEP)}, "field 'x' is Opaque with a value that is not JSON: maximum recursion depth"),
        ({"x": Opaque("y" * 70_000)}, "field 'x' is Opaque with 70002 bytes of JSON: at most 65536 can travel"),
        ({"x": 1.0}, "field 'x' is 1.0 of type float: declare it as PerToken, PerSample or Opaque"),
        ({"a field": PerSample(1.0)}, "names a field 'a field': give it a name of letters, digits and underscores"),
        ({f"x{i}": PerSample(1.0) for i in range(MAX_FIELDS + 1)}, "gives 33 fields: a trajectory may have 32"),
        ([PerSample(1.0)], "not a mapping of names to fields"),
    ],
)
def test_what_cannot_travel_is_refused_where_it_enters(fields: Any, reason: str):
    with pytest.raises(RewardFailure, match=reason):
        checked(fields, "its reply", RewardFailure, tokens=3)


def test_an_array_of_text_is_refused_as_it_is_declared():
    with pytest.raises(ValueError, match="could not convert string to float"):
        PerToken(["a", "b"])  # type: ignore[list-item]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20), st.floats(-1e30, 1e30), st.integers(0, 25))
@settings(max_examples=60, deadline=None)
def test_any_length_but_that_of_the_tokens_is_refused_and_what_enters_comes_back(numbers: list[float], number: float, tokens: int):
    fields = {"each": PerToken(numbers), "all": PerSample(number), "note": Opaque({"n": numbers}), "again": PerToken(numbers[::-1])}
    if len(numbers) != tokens:
        with pytest.raises(RewardFailure, match=f"with {len(numbers)} values, not {tokens}"):
            checked(fields, "it", RewardFailure, tokens=tokens)
    else:
        entered = checked(fields, "it", RewardFailure, tokens=tokens)
        assert_same(from_json(json.loads(json.dumps(to_json(entered)))), entered)


# ---- from environments


async def rolled(replies: Sequence[Any], turns: int = 2) -> Any:
    engine = FakeEngine([[*ids("41"), END], [*ids("4"), END]])
    (found,) = (await roller(engine, lambda: FakeEnvironment(replies), max_turns=turns).roll(3, PROMPT)).trajectories
    return found


async def test_an_environment_gives_tokens_turn_by_turn_or_all_at_the_end():
    found = await rolled(
        [
            replace(MORE, info={"each": PerToken([1, 2, 3]), "tries": 1, "n": PerSample(1)}),
            Reply(info={"each": PerToken([4, 5]), "whole": PerToken(range(5)), "n": PerSample(2), "tries": 2, "said": Opaque(("a", 1))}),
        ]
    )
    assert (found.status, found.info) == (Status.FINISHED, {"tries": 2})
    assert found.fields == {"each": PerToken(range(1, 6)), "whole": PerToken(range(5)), "n": PerSample(2), "said": Opaque(["a", 1])}
    decoded = decode_group(encode_group(Group(3, PROMPT, (found,), 0))).trajectories[0]
    assert_same(decoded.fields, found.fields)


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        (
            {"x": PerToken([1])},
            {},
            "FakeEnvironment.reply: field 'x' is PerToken with 1 values, not 3: one for each token generated so far",
        ),
        (
            {"x": PerToken([1, 2, 3])},
            {"x": PerToken(range(5))},
            "with 5 values, not 2: one for each token generated since it was last given",
        ),
        ({"x": PerToken([1, 2, 3])}, {}, "environment FakeEnvironment: field 'x' is PerToken with 3 values, not 5"),
        ({"x": PerSample(1)}, {"x": PerToken(range(5))}, "field 'x' is PerToken, and was PerSample before: give it one kind"),
        ({"x": PerSample(float("nan"))}, {}, "FakeEnvironment.reply: field 'x' is PerSample with nan"),
        (
            {f"x{i}": PerSample(i) for i in range(20)},
            {f"y{i}": PerSample(i) for i in range(20)},
            "gives its field number 33: a trajectory may have 32",
        ),
    ],
)
async def test_fields_that_do_not_fit_fail_their_trajectory(first: dict[str, Any], last: dict[str, Any], reason: str):
    found = await rolled([replace(MORE, info=first), Reply(info=last)])
    assert found.status is Status.FAILED
    assert reason in found.error
    decode_group(encode_group(Group(3, PROMPT, (found,), 0)))  # it is kept for inspection


# ---- from rewards

REWARDS = """
from verst.fields import Opaque, PerSample, PerToken, Score

def scored(trajectory, fields):
    count = int(trajectory.loss_mask_T.sum())
    each = [i / 3 for i in range(count + (trajectory.info.get("more", 0)))]
    return Score(0.5, {trajectory.info.get("name", "each"): PerToken(each), "all": PerSample(0.1), "why": Opaque({"count": count})})

async def waiting(trajectory, fields):
    return scored(trajectory, fields)
"""


@pytest.mark.parametrize("function", ["scored", "waiting"])
async def test_a_reward_gives_fields_beside_its_number(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "field_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    scorer = Scorer(RewardSpec(f"field_rewards:{function}"), workers=1, deadline_s=20)
    await scorer.start()
    try:
        own = {"mine": PerToken([1, 2, 3])}
        rows = [
            trajectory("4/0", 6, reward=None, fields=own),
            trajectory("4/1", 6, reward=None, info={"more": 2}),
            trajectory("4/2", 6, reward=None, fields=own, info={"name": "mine"}),
        ]
        good, long, twice = (await scorer.score(group_of(*rows))).trajectories
    finally:
        scorer.close()
    third = np.asarray([0, 1 / 3, 2 / 3], np.float32)
    assert good.reward == 0.5
    assert_same(good.fields, {**own, "each": PerToken(third), "all": PerSample(0.1), "why": Opaque({"count": 3})})
    assert long.status is twice.status is Status.FAILED
    assert f"field_rewards:{function} failed: its Score: field 'each' is PerToken with 5 values, not 3" in str(long.error)
    assert "field 'mine' is there already, from the environment or a teacher: give it another name" in str(twice.error)


# ---- in the journal, and on the way to the trainer


def test_groups_and_batches_keep_fields_to_the_bit():
    fields = {"a": PerToken([0.1, 2, -0.0]), "b": Opaque(None), "c": PerToken([3, 4, 5]), "d": PerSample(0.1)}
    group = group_of(trajectory("0/0", 6, fields=fields), trajectory("0/1", 4), trajectory("0/2", 4, fields={"c": PerToken([7, 8])}))
    assert_same(decode_group(encode_group(group)), group)
    batch = fields_batch(1)
    assert_same(decode_batch(encode_batch(batch)), batch)


@pytest.mark.parametrize(("form", "missing", "meta_of_then"), [("group/1", 2, False), ("group/2", 1, True)])
def test_a_group_of_before_there_were_fields_or_branches_is_read(
    form: str, missing: int, meta_of_then: bool, monkeypatch: pytest.MonkeyPatch
):
    group = group_of(trajectory("0/0", 6), trajectory("0/1", 4))
    write = codec._write

    def as_it_was(schema: str, fields: Any, columns: Any, meta: Any) -> bytes:
        kept = {name: value for name, value in meta.items() if meta_of_then or name != "fields"}
        return write(form, fields[:-missing], columns[:-missing], kept)

    monkeypatch.setattr(codec, "_write", as_it_was)
    old = encode_group(group)
    names = pa.ipc.open_stream(old).schema.names
    assert ("per_token" in names, "branch" in names) == (meta_of_then, False)
    assert_same(decode_group(old), group)


def test_samples_that_do_not_fit_each_other_are_refused_by_name():
    def group(*fields: dict[str, Any]) -> Group:
        rows = [trajectory(f"4/{i}", 6, fields=own) for i, own in enumerate(fields)]
        return group_of(*rows)

    options = GrpoConfig()
    with pytest.raises(ExtensionError, match="field 'x' is PerSample in sample 4/0, PerToken in sample 4/1: give it one kind"):
        assemble(1, [group({"x": PerSample(1)}, {"x": PerToken([1, 2, 3])})], options)
    with pytest.raises(ExtensionError, match="sample 4/0: field 'x' is PerToken with 2 values, not 3"):
        assemble(1, [group({"x": PerToken([1, 2])}, {})], options)
    batch = assemble(1, [group({"x": PerSample(1)}, {})], options)
    assert [sample.fields for sample in batch.samples] == [{"x": PerSample(1)}, {}]


# ---- in the loss


@given(st.integers(1, 400), st.permutations(range(6)), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_each_token_has_its_own_values_in_any_microbatch(step: int, order: list[int], count: int):
    batch = with_fields(make_batch(step, groups=3))
    kinds = {"note": Opaque, "share": PerSample, "weight": PerToken}
    microbatch = collate(batch.samples, tuple(order[:count]), CPU)
    found, samples_N = loss_fields(batch.samples, kinds, microbatch, CPU), microbatch.sample_of_token()
    wanted = expected(batch)
    for index in order[:count]:
        assert found["weight"].numpy()[samples_N == index].tobytes() == wanted["weight", index]
        assert found["share"].numpy()[samples_N == index].tobytes() == wanted["share", index]
        assert found["note"][index] == wanted["note", index]


def test_a_field_that_nobody_gave_is_told_by_name():
    batch = fields_batch(1)
    found = loss_fields(batch.samples, {"share": PerSample}, collate(batch.samples, (0, 1), CPU), CPU)
    with pytest.raises(KeyError, match="no sample of this batch has a field 'wieght'; they have: share"):
        found["wieght"]


@pytest.mark.parametrize("train", [{}, {"minibatches": 3, "epochs": 2}])
def test_an_own_loss_sees_them_bit_for_bit(path: str, train: dict[str, Any]):
    batches = [fields_batch(1), fields_batch(2)]
    backend = make_backend(fields_config(path, **train))
    seen, _ = run_steps(backend, batches)
    for batch, found in zip(batches, seen, strict=True):
        assert len(found) == 3 * len(batch.samples) * train.get("epochs", 1)
        assert {(name, sample): values for name, sample, values in found} == expected(batch)


def test_a_loss_that_lets_a_missing_value_through_is_told_what_it_came_from(path: str):
    batch = fields_batch(1)
    backend = make_backend(fields_config(path, microbatch_tokens=400))
    from verst.training.broken import broken_samples

    backend.load_batch(batch)
    step = backend._loaded("test")
    (microbatch,) = step.microbatches(0)
    inputs = step.inputs(microbatch, torch.zeros(microbatch.loss_tokens), [0.0] * 6)
    lines = broken_samples(batch.samples, microbatch, inputs, inputs.fields["weight"] * inputs.logprobs)
    assert sorted(line.partition(",")[0] for line in lines) == ["sample 0/0", "sample 1/1"]
    assert all(line.endswith("tokens: field 'weight' is not finite") for line in lines)


def test_the_contract_of_a_loss_makes_the_fields_that_it_reads():
    fields = {"weight": lambda tokens: PerToken(np.linspace(0, 1, tokens)), "share": lambda tokens: PerSample(0.5)}
    check_loss(seeing_loss, fields=fields | {"note": lambda tokens: Opaque([tokens])})
    with pytest.raises(ExtensionError, match="KeyError: 'weight'"):
        check_loss(seeing_loss)

    rng = np.random.default_rng(0)

    def of_the_neighbour(inputs: LossInputs) -> torch.Tensor:
        return inputs.logprobs * inputs.fields["weight"].roll(1)

    with pytest.raises(AssertionError, match="another loss in another microbatch"):
        check_loss(of_the_neighbour, fields={"weight": lambda tokens: PerToken(rng.random(tokens))})


def test_environments_whose_fields_differ_are_told_apart():
    """What `check_environment` compares."""
    assert Reply(info={"x": PerToken([1, 2])}) == Reply(info={"x": PerToken([1, 2])})
    assert Reply(info={"x": PerToken([1, 2])}) != Reply(info={"x": PerToken([1, 3])})
    assert Score(1.0, {"x": PerSample(1)}) != Score(1.0, {"x": Opaque(1)})
    with pytest.raises(EnvironmentFailure, match="field 'x' is"):
        checked({"x": PerSample(None)}, "it", EnvironmentFailure)  # type: ignore[arg-type]
