"""Advantages and a loss of a user's own: how they are found, what they may return, and the contracts that a user runs on them."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from verst.algorithms.losses import LossInputs, LossOutput, grpo_loss
from verst.algorithms.own import call_advantages, call_loss, check_function, own_advantages, with_own_loss
from verst.algorithms.table import algorithm_for
from verst.config.algorithms import GrpoConfig
from verst.errors import ExtensionError
from verst.testing import check_advantages, check_loss
from verst.types import Sample

EXAMPLE = Path(__file__).parents[2] / "examples/algorithms/own.py"
HERE = "tests.unit.test_own_algorithm"


def inputs(logprobs: Sequence[float], old: Sequence[float], advantages: Sequence[float]) -> LossInputs:
    old_N, of_N = torch.tensor(old), torch.arange(len(old))
    return LossInputs(torch.tensor(logprobs).requires_grad_(), old_N, old_N, None, torch.tensor(advantages), of_N, of_N)


def halves(rewards_N: NDArray[np.float64], groups_N: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.float64]:
    return rewards_N / 2


def plain(inputs: LossInputs) -> torch.Tensor:
    return -inputs.advantages * inputs.logprobs


def takes_nothing() -> None: ...


def test_the_example_keeps_the_contracts_and_has_the_numbers_worked_by_hand():
    example = runpy.run_path(str(EXAMPLE))
    check_advantages(example["advantages"])
    check_loss(example["loss"])
    # Groups {0, 1, 5} and {2, 4}: medians 1 and 3.
    found = call_advantages(example["advantages"], np.array([0.0, 2, 1, 4, 5]), np.array([7, 9, 7, 9, 7]), [None] * 5)  # type: ignore[list-item]
    assert found.tolist() == [-1, -1, 0, 1, 4]
    # Ratios e^0.5, e^1 and e^1; the second is bounded by 2, since its advantage is negative.
    output = call_loss(example["loss"], inputs([-1.0, -1.0, -1.0], [-1.5, -2.0, -2.0], [2.0, -1.0, 1.0]))
    assert output.per_token.tolist() == pytest.approx([-2 * np.exp(0.5), 2.0, -np.exp(1.0)])
    assert output.metrics["bounded"].tolist() == [0, 1, 0]


def test_names_in_the_run_file_take_the_place_of_the_algorithms_own():
    options = GrpoConfig(advantages=f"{HERE}:halves", loss=f"{HERE}:plain")
    assert own_advantages(options) is halves
    given = inputs([-1.0, -2.0], [-1.0, -1.0], [1.0, -1.0])
    assert with_own_loss(algorithm_for(options), options).loss(given, options).per_token.tolist() == [1.0, -2.0]
    assert own_advantages(GrpoConfig()) is None
    assert with_own_loss(algorithm_for(options), GrpoConfig()).loss is grpo_loss


@pytest.mark.parametrize("kind", ["advantages", "loss"])
def test_one_that_cannot_be_called_is_refused_with_the_call_that_is_made(kind: str):
    options = GrpoConfig.model_validate({kind: f"{HERE}:takes_nothing"})
    with pytest.raises(ExtensionError, match=rf"{kind} takes_nothing\(\).* cannot be called as takes_nothing\((rewards_N, groups|inputs)"):
        own_advantages(options) if kind == "advantages" else with_own_loss(algorithm_for(options), options)


def swapped(groups_N: Any, rewards_N: Any, samples: Any) -> Any:
    return rewards_N


async def waits(inputs: Any) -> Any:
    return inputs.logprobs


class Made:
    def __init__(self, rewards_N: Any, groups_N: Any, samples: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (
            "advantages",
            "swapped",
            r"cannot be called as swapped\(rewards_N, groups_N, samples\): its parameter 'groups_N' would be given rewards_N",
        ),
        ("advantages", "Made", r"advantages Made is a class, .*expected: def Made\(rewards_N, groups_N, samples\)"),
        ("loss", "waits", r"loss waits is async, .*write a plain `def`; expected: def waits\(inputs\)"),
    ],
)
def test_what_only_the_first_step_would_find_is_refused_at_the_start(kind: str, name: str, reason: str):
    with pytest.raises(ExtensionError, match=reason):
        check_function(globals()[name], kind)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (np.zeros(3), r"an array of shape \[3\], not \[12\]"),
        (1.0, r"an array of shape \[\], not \[12\]"),
        ("much", "returned 'much', and NumPy raised ValueError"),
        (np.full(12, np.nan), "returned nan for sample 0/0"),
    ],
)
def test_advantages_that_are_no_finite_number_for_each_sample(returned: Any, reason: str):
    with pytest.raises(ExtensionError, match=reason):
        check_advantages(lambda rewards_N, groups_N, samples: returned)


def test_what_advantages_raise_is_told_with_its_line():
    def fails(rewards_N: Any, groups_N: Any, samples: Any) -> Any:
        raise KeyError("speed")

    with pytest.raises(ExtensionError, match=r"advantages .*fails raised KeyError: 'speed' \(.*test_own_algorithm.py"):
        check_advantages(fails)


def test_advantages_that_depend_on_the_order_or_on_the_call_break_the_contract():
    calls: list[int] = []

    def counts(rewards_N: Any, groups_N: Any, samples: Any) -> Any:
        calls.append(1)
        return rewards_N + len(calls)

    with pytest.raises(AssertionError, match="the same batch has other advantages now"):
        check_advantages(counts)
    with pytest.raises(AssertionError, match="in another order"):
        check_advantages(lambda rewards_N, groups_N, samples: np.arange(len(samples)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda inputs: plain(inputs).mean(), r"per_token \[\], not a tensor of shape \[15\]: one value for each token, not their mean"),
        (lambda inputs: None, "per_token None of type NoneType"),
        (lambda inputs: plain(inputs).detach(), "does not depend on inputs.logprobs"),
        (lambda inputs: LossOutput(plain(inputs), {"x": torch.zeros(2)}), r"returned x \[2\], not a tensor of shape \[15\]"),
        (lambda inputs: inputs.nothing, "raised AttributeError"),
    ],
)
def test_a_loss_that_cannot_be_weighed_and_differentiated(function: Any, reason: str):
    with pytest.raises(ExtensionError, match=reason):
        check_loss(function)


def test_a_loss_that_depends_on_its_microbatch_or_is_not_finite_breaks_the_contract():
    with pytest.raises(AssertionError, match="has another loss in another microbatch"):
        check_loss(lambda inputs: plain(inputs) - inputs.logprobs.mean())
    with pytest.raises(AssertionError, match="a loss that is not finite"):
        check_loss(lambda inputs: plain(inputs) / 0)


def test_losses_that_are_shipped_keep_the_contract():
    from verst.algorithms.losses import cispo_loss, gspo_loss

    for loss in (grpo_loss, gspo_loss, cispo_loss):
        check_loss(lambda inputs, loss=loss: loss(inputs, GrpoConfig()))


def test_corrections_and_kl_of_the_run_file_apply_to_it():
    """k3 of 0.5 nats is e^-0.5 - 1 + 0.5, weighed by 0.1; a token twice as probable for the trainer as it was sampled counts double."""
    options = GrpoConfig.model_validate(
        {"loss": f"{HERE}:plain", "kl_coefficient": 0.1, "corrections": [{"kind": "truncate", "level": "token", "upper": 3.0}]}
    )
    behaviour_N = torch.tensor([-1.0 - np.log(2.0)], dtype=torch.float32)
    given = LossInputs(
        torch.tensor([-1.0]).requires_grad_(),
        torch.tensor([-1.0]),
        behaviour_N,
        torch.tensor([-1.5]),
        torch.tensor([3.0]),
        torch.zeros(1).long(),
        torch.zeros(1).long(),
    )
    output = with_own_loss(algorithm_for(options), options).loss(given, options)
    assert output.per_token.item() == pytest.approx(2 * 3.0 + 0.1 * (np.exp(-0.5) - 1 + 0.5))
