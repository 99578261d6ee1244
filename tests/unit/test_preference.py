"""DPO: the loss by hand and against a plain loop over the transformers model, pairs that stay together, and how pairs are read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fsdp_cases import BATCHES, largest_difference, make_backend, make_config, path, train, weights_of
from verst.algorithms.losses import LossInputs, dpo_loss
from verst.algorithms.selection import best_and_worst
from verst.algorithms.table import ALGORITHMS
from verst.config.algorithms import DpoConfig, OnlineDpoConfig
from verst.config.load import load_config
from verst.config.schema import DataConfig
from verst.data.packing import plan_step
from verst.data.prompts import to_prompt
from verst.data.sources import Row
from verst.errors import ConfigError, DataError, InvariantViolation
from verst.types import Batch, Message, Sample

__all__ = ["path"]  # a fixture

DPO: dict[str, Any] = {
    "algorithm": {"name": "dpo", "beta": 0.5},
    "data": {"columns": {"chosen": "chosen", "rejected": "rejected"}},
    "train": {"minibatches": 2, "epochs": 2, "clip_norm": 0.5},
}


def inputs_of(logprobs: list[float], reference: list[float] | None, signs: list[float], samples: list[int]) -> LossInputs:
    log_N = torch.tensor(logprobs).requires_grad_()
    kept = None if reference is None else torch.tensor(reference)
    return LossInputs(log_N, log_N.detach(), log_N.detach(), kept, torch.tensor(signs), torch.tensor(samples), torch.tensor(samples))


def test_the_loss_by_hand():
    """r(chosen) = 0.1 · (0.5 + 0.5) = 0.1 and r(rejected) = 0.1 · (−2) = −0.2: the loss is log(1 + exp(−0.3)) = 0.554355."""
    given = inputs_of([-1.0, -1.5, -4.0], [-1.5, -2.0, -2.0], [1.0, 1.0, -1.0], [6, 6, 7])
    output = dpo_loss(given, DpoConfig())
    assert output.per_token.tolist() == pytest.approx([0.554355] * 3, abs=1e-6)
    found = {name: values.tolist() for name, values in output.pair_metrics.items()}
    assert found["chosen_reward"] == pytest.approx([0.1])
    assert found["rejected_reward"] == pytest.approx([-0.2])
    assert found["reward_margin"] == pytest.approx([0.3])
    assert found["reward_accuracy"] == [1.0]
    weights_N = torch.tensor([0.25, 0.25, 0.5])  # of `sequence_mean`: two samples
    (weights_N * output.per_token).sum().backward()
    slope = 0.1 / (1 + math.exp(0.3))  # beta · σ(−margin): eq. 7's gradient
    assert given.logprobs.grad is not None
    assert given.logprobs.grad.tolist() == pytest.approx([-slope, -slope, slope], abs=1e-6)


def test_a_margin_beyond_what_exp_can_hold_has_a_finite_loss():
    output = dpo_loss(inputs_of([-9000.0, 0.0], [0.0, -9000.0], [1.0, -1.0], [0, 1]), DpoConfig(beta=1.0))
    assert output.per_token.tolist() == [18000.0, 18000.0]


def test_half_a_pair_and_a_missing_reference_are_told():
    with pytest.raises(InvariantViolation, match="one sample of a pair without the other"):
        dpo_loss(inputs_of([-1.0, -2.0], [-1.0, -1.0], [1.0, -1.0], [0, 3]), DpoConfig())
    with pytest.raises(InvariantViolation, match="no reference log-probabilities"):
        dpo_loss(inputs_of([-1.0, -2.0], None, [1.0, -1.0], [0, 1]), DpoConfig())


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [
        ([0.0, 1.0, 0.5], (0, 1)),
        ([1.0, 0.0], (0, 1)),
        ([2.0, 1.0, 2.0, 1.0], (0, 1)),
        ([0.5, 3.0, 0.1, 3.0], (1, 2)),
        ([1.0, 1.0], ()),
        ([], ()),
    ],
)
def test_the_best_and_the_worst_of_a_group(rewards: list[float], pair: tuple[int, ...]):
    assert best_and_worst(rewards) == pair


def test_a_tie_has_no_pair():
    without_signal = ALGORITHMS["online_dpo"].without_signal
    assert without_signal([1.0, 1.0], OnlineDpoConfig()) == "all its rewards are equal (1.0), so no two make a pair"
    assert without_signal([1.0, 0.0], OnlineDpoConfig()) is None


# ---- against a loop anyone would write


def pairs_of(batch: Batch) -> Batch:
    """Its groups are of two already; as the data would have them."""
    samples = tuple(
        replace(
            s,
            reward=float(1 - i % 2),
            versions_T=np.full_like(s.versions_T, -1),
            behaviour_logprobs_T=np.zeros_like(s.behaviour_logprobs_T),
        )
        for i, s in enumerate(batch.samples)
    )
    return replace(batch, samples=samples)


def summed(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    tokens_T = torch.from_numpy(sample.tokens_T).long()
    logs_TV = model(input_ids=tokens_T[None]).logits[0, :-1].log_softmax(-1)
    return (logs_TV.gather(1, tokens_T[1:, None])[:, 0] * torch.from_numpy(sample.loss_mask_T)[1:]).sum()


def plain_dpo(model_path: str, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Each step two minibatches of two pairs, twice; beta 0.5. Also the losses."""
    model, initial = (transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval() for _ in range(2))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)
    losses = []
    for batch in batches:
        for update in range(4):
            samples = batch.samples[:4] if update % 2 == 0 else batch.samples[4:]
            terms = []
            for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
                with torch.no_grad():
                    before = summed(initial, chosen) - summed(initial, rejected)
                terms.append(-torch.nn.functional.logsigmoid(0.5 * (summed(model, chosen) - summed(model, rejected) - before)))
            loss = torch.stack(terms).mean()
            adamw.zero_grad()
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("microbatch_tokens", [24, 1000])
def test_eight_updates_equal_a_plain_pytorch_loop(path: str, microbatch_tokens: int):
    """Also in microbatches of one pair, and in one of all."""
    batches = [pairs_of(batch) for batch in BATCHES[:2]]
    config = make_config(path, **DPO | {"train": DPO["train"] | {"microbatch_tokens": microbatch_tokens}})
    backend = make_backend(config)
    start = weights_of(backend)
    reports = [tally.report() for tally in train(backend, config, batches)]
    expected, losses = plain_dpo(path, batches)
    assert largest_difference(start, expected) > 0.02
    assert largest_difference(weights_of(backend), expected) < 5e-5
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the model is its own reference
    assert [report["loss/total"] for report in reports] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], rel=1e-4)
    for report in reports:
        assert report["policy/chosen_reward"] - report["policy/rejected_reward"] == pytest.approx(report["policy/reward_margin"], abs=1e-5)
    assert min(report["policy/reward_margin"] for report in reports) > 0  # it learns


# ---- pairs stay together


@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=24).filter(lambda found: len(found) % 2 == 0),
    minibatches=st.integers(1, 3),
    ranks=st.integers(1, 4),
    budget=st.integers(60, 200),
    packed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_microbatch_has_half_a_group(lengths: list[int], minibatches: int, ranks: int, budget: int, packed: bool):
    groups = [i // 2 for i in range(len(lengths))]
    plan = plan_step(
        lengths, groups, minibatches=minibatches, epochs=1, ranks=ranks, microbatch_tokens=budget, packed=packed, whole_groups=True
    )
    found = [m for update in plan.updates for rank in update.ranks for m in rank]
    assert sorted(i for m in found for i in m) == list(range(len(lengths)))
    for microbatch in found:
        assert {i ^ 1 for i in microbatch} == set(microbatch)
        cost = sum(lengths[i] for i in microbatch) if packed else len(microbatch) * max((lengths[i] for i in microbatch), default=0)
        assert cost <= budget
    for update in plan.updates:
        assert len({len(rank) for rank in update.ranks}) == 1


def test_a_pair_that_is_too_long_for_one_forward_is_told():
    with pytest.raises(
        ConfigError, match=r"samples 2, 3 of the batch belong to one group and need one forward of 80 tokens: .* Raise it to 80"
    ):
        plan_step([5, 5, 30, 40], [0, 0, 1, 1], minibatches=1, epochs=1, ranks=1, microbatch_tokens=60, whole_groups=True)


# ---- how pairs are read

USER, RIGHT, WRONG = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
PAIR = DataConfig(columns={"chosen": "chosen", "rejected": "rejected"})


def read(values: dict[str, Any], data: DataConfig = PAIR):
    return to_prompt(Row("file:0", lambda: values, lambda: "file, line 1"), data)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": "2 + 2?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},  # as in UltraFeedback
        {"chosen": "2 + 2?4", "rejected": "2 + 2?5"},
    ],
    ids=["text", "conversation", "implicit conversation", "both", "implicit text"],
)
def test_the_forms_of_a_pair(row: dict[str, Any]):
    prompt = read(row | {"score": 0.7})
    assert prompt.messages == (Message("user", "2 + 2?"),)
    assert (prompt.demonstration, prompt.rejected) == ((Message("assistant", "4"),), (Message("assistant", "5"),))
    assert prompt.fields == {"score": 0.7}


def test_a_space_before_the_answers_belongs_to_them_as_in_trl():
    prompt = read({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert prompt.messages[0].content == "The sky is"
    assert (prompt.demonstration[0].content, prompt.rejected[0].content) == (" blue.", " green.")


def test_several_turns_in_common_and_several_that_differ():
    more = [USER, RIGHT, {"role": "user", "content": "sure?"}]
    prompt = read({"chosen": [*more, RIGHT, USER, RIGHT], "rejected": [*more, WRONG]})
    assert [m.content for m in prompt.messages] == ["2 + 2?", "4", "sure?"]
    assert [m.content for m in prompt.demonstration] == ["4", "2 + 2?", "4"]


def test_columns_of_a_pair_may_have_other_names_and_are_fields_without_being_named():
    data = DataConfig(columns={"prompt": "q", "chosen": "good", "rejected": "bad"}, system="Be brief.")
    prompt = read({"q": "2 + 2?", "good": "4", "bad": "5"}, data)
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert prompt.rejected == (Message("assistant", "5"),)
    assert read({"prompt": "p", "chosen": "4", "rejected": "5"}, DataConfig()).fields == {"chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "4", "rejected": "5"}, "must be two answers to the prompt or"),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, "must be two answers to the prompt or"),
        ({"chosen": [USER, RIGHT], "rejected": [USER]}, "must be two answers to the prompt or"),
        ({"prompt": "p", "chosen": "4", "rejected": "4"}, "are the same answer"),
        ({"prompt": "p", "chosen": "4"}, "no column 'rejected'"),
    ],
)
def test_what_is_no_pair_is_told_with_its_row(row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=f"file, line 1.*{message}"):
        read(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.columns": "{chosen: a}"}, "data.columns has chosen only: a pair is chosen and rejected"),
        ({"data.columns": "{chosen: a, rejected: b, messages: c}"}, "takes neither messages nor demonstration"),
        ({"algorithm.name": "grpo"}, "data.columns has chosen and rejected, but grpo compares no pairs"),
        ({"rollout.group_size": "4"}, "rollout.group_size does not apply: sft and dpo learn from answers that the data has"),
        ({"train.microbatch_tokens": "1500"}, r"train.microbatch_tokens \(1500\) is below two of the longest trajectories"),
        ({"algorithm.aggregate": "token_mean"}, "algorithm.aggregate"),
        (
            {"algorithm.name": "online_dpo", "data.columns": "{}", "rollout.group_size": "1"},
            "online_dpo compares two answers of each group",
        ),
    ],
)
def test_a_run_file_that_cannot_compare_pairs_is_told_why(tmp_path: Path, changes: dict[str, str], message: str):
    base = {"data.columns": "{chosen: chosen, rejected: rejected}", "algorithm.name": "dpo", "run.steps": "3", "model.path": "m"}
    with pytest.raises(ConfigError, match=message):
        load_config({"run": {"steps": 3}, "model": {"path": "m"}}, [f"{key}={value}" for key, value in (base | changes).items()])
