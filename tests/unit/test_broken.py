"""Which sample, rank and tensor an update that is not finite came from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.fsdp_cases import BATCHES, make_backend, make_config, path, train
from verst.errors import TrainingDiverged
from verst.training import broken as module
from verst.training.broken import Findings, attributed, first_broken

__all__ = ["path"]  # a fixture

NAN = float("nan")


def notes(backend: Any, config: Any, batch: Any, advantages: list[float]) -> list[str]:
    return list(train(backend, config, [batch], advantages=advantages)[0].notes)


def test_the_sample_whose_advantage_is_no_number_is_named(path: str):
    config = make_config(path)
    (line,) = notes(make_backend(config), config, BATCHES[0], [1.0] * 5 + [NAN] + [1.0] * 2)
    sample = BATCHES[0].samples[5]
    count = int(sample.loss_mask_T.sum())
    assert line.startswith(
        f"update 1 of 1 of step 1 is not finite, and is skipped: trainer rank 0: sample {sample.id}, {count} of {count} tokens: "
        "the advantage is not finite; the first gradient that is not finite: model.embed_tokens.weight ("
    )
    assert line.endswith(" elements) on trainer rank 0")


def test_the_model_that_computes_no_number_is_told_from_the_data(path: str):
    config = make_config(path, algorithm={"name": "grpo", "old_logprobs": "behaviour"})
    backend = make_backend(config)
    with torch.no_grad():
        backend._parameters["model.norm.weight"][3] = NAN
    backend._rest.forget()  # as if the update before had made it so
    (line,) = notes(backend, config, BATCHES[0], [1.0] * 8)
    assert line.count("the trainer's log-probability is not finite") == 3
    assert "and 5 more" in line
    assert "first gradient that is not finite: model.embed_tokens.weight" in line


def test_a_sampled_log_probability_that_is_no_number(path: str):
    config = make_config(path, algorithm={"name": "grpo", "old_logprobs": "behaviour"})
    spoiled = BATCHES[0].samples[2].behaviour_logprobs_T.copy()
    spoiled[np.flatnonzero(BATCHES[0].samples[2].loss_mask_T)[1]] = -np.inf
    samples = tuple(replace(s, behaviour_logprobs_T=spoiled) if i == 2 else s for i, s in enumerate(BATCHES[0].samples))
    (line,) = notes(make_backend(config), config, replace(BATCHES[0], samples=samples), [1.0] * 8)
    assert f"sample {samples[2].id}, 1 of " in line
    assert "tokens: the sampled log-probability is not finite;" in line


def test_finite_losses_whose_gradients_overflow(path: str):
    config = make_config(path)
    (line,) = notes(make_backend(config), config, BATCHES[0], [3e38] + [0.0] * 7)
    assert line.startswith("update 1 of 1 of step 1 is not finite, and is skipped: ")
    assert "sample" not in line
    assert "gradient" in line


def test_the_last_attribution_is_in_the_error(path: str):
    config = make_config(path, train={"max_skipped_updates": 2})
    backend = make_backend(config)
    notes(backend, config, BATCHES[0], [NAN] * 8)
    with pytest.raises(
        TrainingDiverged, match=r"2 updates in a row .*: trainer rank 0: sample .*advantage is not finite.* and 5 more; the"
    ):
        notes(backend, config, BATCHES[1], [NAN] * 8)


def test_nothing_is_looked_for_in_a_healthy_update(path: str, monkeypatch: pytest.MonkeyPatch):
    def never(*args: Any) -> Any:
        raise AssertionError("looked for what is wrong")

    monkeypatch.setattr("verst.training.optimizer.attributed", never)
    monkeypatch.setattr("verst.training.optimizer.first_broken", never)
    monkeypatch.setattr("verst.training.loss.broken_samples", never)
    config = make_config(path)
    assert notes(make_backend(config), config, BATCHES[0], [1.0] * 8) == []


def test_the_first_in_the_order_given():
    fine, bad = torch.ones(3), torch.tensor([1.0, NAN, float("inf")])
    assert first_broken([("a", fine), ("b", bad), ("c", bad)]) == "b (2 of 3 elements)"
    assert first_broken([("a", fine)]) is None


def test_ranks_that_say_the_same_are_named_together(monkeypatch: pytest.MonkeyPatch):
    told = [Findings([], "w (1 of 2 elements)"), Findings(["sample 1/0"], None), Findings([], "w (1 of 2 elements)"), Findings([], None)]
    monkeypatch.setattr(module, "all_ranks", lambda own: told)
    expected = "trainer rank 1: sample 1/0; the first gradient that is not finite: w (1 of 2 elements) on trainer ranks 0, 2"
    assert attributed(told[0]) == expected
    monkeypatch.setattr(module, "all_ranks", lambda own: [Findings([], None)] * 2)
    assert attributed(told[3]) == "each gradient is finite, their norm overflows"
