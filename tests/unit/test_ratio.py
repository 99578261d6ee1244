"""What the ratio of a loss is of, in a real step: the same for losses that are shipped and for a user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.unit.fsdp_cases import BATCHES, make_backend, make_config, path, train
from tests.unit.test_fsdp_backend import plain_logprobs
from verst.algorithms.losses import LossInputs, LossOutput

__all__ = ["path"]  # a fixture


def own(inputs: LossInputs) -> LossOutput:
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    return LossOutput(-ratio * inputs.advantages, {"ratio": ratio})


@pytest.mark.parametrize("loss", [{}, {"loss": f"{__name__}:own"}], ids=["shipped", "own"])
@pytest.mark.parametrize("old", ["trainer", "behaviour"])
def test_the_denominator_is_the_trainer_before_the_step_or_what_sampled(path: str, loss: dict[str, Any], old: str) -> None:
    config = make_config(path, algorithm={"name": "grpo", "old_logprobs": old, **loss}, train={"minibatches": 1, "epochs": 2, "lr": 1e-9})
    (tally,) = train(make_backend(config), config, BATCHES[:1])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        now = np.concatenate([plain_logprobs(model, sample, 0.8).numpy() for sample in BATCHES[0].samples])
    sampled = np.concatenate([sample.behaviour_logprobs_T[sample.loss_mask_T] for sample in BATCHES[0].samples])
    expected = np.exp(now - sampled).mean() if old == "behaviour" else 1.0
    assert abs(np.exp(now - sampled).mean() - 1) > 0.2
    assert tally.report()["policy/ratio"] == pytest.approx(expected, rel=1e-5)
