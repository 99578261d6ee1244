"""Schedule, weight decay and the first AdamW step, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from verst.config.schema import TrainConfig
from verst.training.optimizer import MasterAdamW, learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_rates_of_six_updates_with_two_of_warm_up(schedule: str, expected: list[float]) -> None:
    rates = [learning_rate(u, peak=1.0, schedule=schedule, warmup=2, total=6) for u in range(6)]  # pyright: ignore[reportArgumentType]
    assert rates == pytest.approx(expected)


def test_a_schedule_never_rises_again_after_its_end() -> None:
    assert learning_rate(99, peak=1.0, schedule="cosine", warmup=0, total=6) == 0
    assert learning_rate(99, peak=1.0, schedule="linear", warmup=0, total=6) == 0
    assert learning_rate(3, peak=1.0, schedule="linear", warmup=6, total=4) == pytest.approx(4 / 6)


def stepped(gradients: dict[str, torch.Tensor], **options: float) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    parameters = {name: nn.Parameter(torch.full_like(gradient, 2.0)) for name, gradient in gradients.items()}
    optimizer = MasterAdamW(parameters, TrainConfig.model_validate({"lr": 0.1, "clip_norm": 1e9} | options), 1, 10)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    report = optimizer.step().report()
    return {name: parameter.detach() for name, parameter in parameters.items()}, report


def test_only_matrices_decay() -> None:
    """With gradient 0 AdamW changes only what decays: 2 · (1 − 0.1 · 0.5) = 1.9."""
    zeros = {"layer.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2), "experts.bias": torch.zeros(2, 2)}
    parameters, _ = stepped(zeros, weight_decay=0.5)
    assert {name: round(float(p.flatten()[0]), 6) for name, p in parameters.items()} == {
        "layer.weight": 1.9,
        "norm.weight": 2.0,
        "experts.bias": 2.0,
    }


def test_norm_and_clip_are_of_all_parameters_together() -> None:
    """Gradients 3 and 4 have norm 5. The first step of Adam moves by lr · g / (|g| + 1e-8): clipped to 1e-8/5 of it, by less."""
    gradients = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    _, report = stepped(gradients)
    assert report["update/grad_norm"] == pytest.approx(5.0)
    clipped, _ = stepped({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, clip_norm=5e-8)
    assert 2.0 - float(clipped["a"]) == pytest.approx(0.1 * 3e-8 / (3e-8 + 1e-8), rel=1e-4)
    assert 2.0 - float(clipped["b"]) == pytest.approx(0.1 * 4e-8 / (4e-8 + 1e-8), rel=1e-4)


def test_masters_of_a_float32_model_are_its_own_parameters() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = MasterAdamW({"w": parameter}, TrainConfig.model_validate({}), 1, 1)
    assert optimizer.masters["w"].data_ptr() == parameter.data_ptr()
