"""Importance corrections: numbers worked by hand, an independent NumPy version, and what the run file may combine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fsdp_cases import BATCHES, make_backend, make_config, path, train
from verst.algorithms.corrections import correct, mask, ratios, reject, truncate
from verst.algorithms.losses import LossInputs, grpo_loss
from verst.config.algorithms import CorrectionConfig, GrpoConfig
from verst.config.load import dump_config, load_config
from verst.errors import ConfigError
from verst.types import Sample

__all__ = ["path"]  # a fixture

# Three samples, interleaved, with the trainer's probability ½ everywhere, so that ratios are ½ / behaviour probability:
# sample 4: ¼, ½ → ratios 2, 1; product 2, geometric mean √2
# sample 9: 1, ⅛ → ratios ½, 4; product 2, geometric mean √2
# sample 2: 1 → ratio ½, at every level
SAMPLES = torch.tensor([4, 9, 4, 9, 2])
TRAINER = torch.tensor([0.5] * 5, dtype=torch.float64).log()
BEHAVIOUR = torch.tensor([0.25, 1.0, 0.5, 0.125, 1.0], dtype=torch.float64).log()
ROOT = math.sqrt(2)


def corrections(*options: dict[str, Any]) -> list[CorrectionConfig]:
    return [CorrectionConfig.model_validate(o) for o in options]


def weights(*options: dict[str, Any]) -> list[float]:
    return correct(TRAINER, BEHAVIOUR, SAMPLES, corrections(*options))[0].tolist()


@pytest.mark.parametrize(
    ("level", "expected"),
    [("token", [2, 0.5, 1, 4, 0.5]), ("geometric", [ROOT, ROOT, ROOT, ROOT, 0.5]), ("sequence", [2, 2, 2, 2, 0.5])],
)
def test_ratios_worked_by_hand(level: Any, expected: list[float]):
    found = ratios(TRAINER, BEHAVIOUR, SAMPLES, level)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


def test_truncation_worked_by_hand():
    assert weights({"kind": "truncate", "level": "token", "upper": 1.5}) == pytest.approx([1.5, 0.5, 1, 1.5, 0.5])
    assert weights({"kind": "truncate", "level": "geometric", "upper": 1.2}) == pytest.approx([1.2, 1.2, 1.2, 1.2, 0.5])
    assert weights({"kind": "truncate", "level": "sequence", "upper": 3}) == pytest.approx([2, 2, 2, 2, 0.5])


def test_masking_worked_by_hand():
    # IcePop with the band [0.6, 2.5]: the ratios ½ and 4 are outside.
    assert weights({"kind": "mask", "level": "token", "lower": 0.6, "upper": 2.5}) == pytest.approx([2, 0, 1, 0, 0])
    # MIS of whole sequences: products 2, 2, ½; kept unchanged up to 2.1, and none but the last up to 1.9.
    assert weights({"kind": "mask", "level": "sequence", "upper": 2.1}) == pytest.approx([2, 2, 2, 2, 0.5])
    assert weights({"kind": "mask", "level": "sequence", "upper": 1.9}) == pytest.approx([0, 0, 0, 0, 0.5])


def test_rejection_worked_by_hand():
    """It takes whole samples out, and weighs the others by nothing but 1."""
    assert weights({"kind": "reject", "level": "geometric", "upper": 1.5}) == [1, 1, 1, 1, 1]
    assert weights({"kind": "reject", "level": "geometric", "lower": 0.9, "upper": 1.5}) == [1, 1, 1, 1, 0]
    # By the smallest ratio of its tokens: samples 9 and 2 have one of ½.
    assert weights({"kind": "reject", "level": "token", "lower": 0.6}) == [1, 0, 1, 0, 0]
    # By the largest: sample 9 has one of 4.
    assert weights({"kind": "reject", "level": "token", "upper": 3}) == [1, 0, 1, 0, 1]


def test_bounds_belong_to_the_band():
    exact = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert mask(exact, 0.5, 2.0).tolist() == [0.5, 2.0]
    assert reject(exact, torch.tensor([0, 0]), 0.5, 2.0).tolist() == [1, 1]


def test_corrections_multiply_in_any_order_and_report_what_they_did():
    both = [{"kind": "truncate", "level": "token", "upper": 1.5}, {"kind": "reject", "level": "token", "upper": 3}]
    expected = [1.5, 0, 1, 0, 0.5]
    assert weights(*both) == weights(*reversed(both)) == pytest.approx(expected)
    _, metrics = correct(TRAINER, BEHAVIOUR, SAMPLES, corrections(*both))
    assert metrics["weight"].tolist() == pytest.approx(expected)
    assert metrics["truncated"].tolist() == [1, 0, 0, 1, 0]  # the ratios 2 and 4
    assert metrics["masked"].tolist() == [0, 1, 0, 1, 0]


def test_a_long_sequence_neither_overflows_nor_hides():
    """8,000 tokens with Δ = ½ have the product e⁴⁰⁰⁰, which no float holds, and the geometric mean √e."""
    trainer, samples = torch.zeros(8000), torch.zeros(8000, dtype=torch.int64)
    behaviour = torch.full((8000,), -0.5)

    def first(**options: Any) -> float:
        return correct(trainer, behaviour, samples, corrections(options))[0][0].item()

    assert first(kind="truncate", level="sequence", upper=2) == 2
    assert first(kind="mask", level="sequence", upper=2) == 0
    assert first(kind="reject", level="sequence", upper=2) == 0
    assert first(kind="truncate", level="geometric", upper=2) == pytest.approx(math.sqrt(math.e))


def test_a_broken_log_probability_is_masked_but_never_weighed_as_a_number():
    ratio = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    samples = torch.tensor([0, 1])
    assert truncate(ratio, 2.0).isnan().tolist() == [True, False]  # the update is then skipped as not finite, and told
    assert mask(ratio, 0.5, 2.0).tolist() == [0, 1]
    assert reject(ratio, samples, 0.5, 2.0).tolist() == [0, 1]


# An independent version: one sample after another, in plain Python and NumPy


def numpy_weights(trainer, behaviour, samples, options):
    out = np.ones(len(trainer))
    for sample in set(samples):
        own = np.flatnonzero(np.array(samples) == sample)
        tokens = np.exp(trainer[own] - behaviour[own])
        product = np.full(len(own), np.prod(tokens))
        by_level = {"token": tokens, "geometric": product ** (1 / len(own)), "sequence": product}
        for option in options:
            ratio, low, high = by_level[option["level"]], option.get("lower", 0.0), option.get("upper", math.inf)
            if option["kind"] == "truncate":
                out[own] *= [min(r, high) for r in ratio]
            elif option["kind"] == "mask":
                out[own] *= [r if low <= r <= high else 0.0 for r in ratio]
            elif min(ratio) < low or max(ratio) > high:
                out[own] = 0
    return out


LEVELS = st.sampled_from(["token", "geometric", "sequence"])
WEIGHING = st.one_of(
    st.fixed_dictionaries({"kind": st.just("truncate"), "level": LEVELS, "upper": st.floats(1, 4)}),
    st.fixed_dictionaries({"kind": st.just("mask"), "level": LEVELS, "lower": st.floats(0, 1), "upper": st.floats(1, 4)}),
)
REJECTING = st.fixed_dictionaries({"kind": st.just("reject"), "level": LEVELS, "lower": st.floats(0.01, 1), "upper": st.floats(1, 4)})


@given(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.integers(0, 5)), min_size=1, max_size=30),
    st.lists(WEIGHING, max_size=1),
    st.lists(REJECTING, max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_corrections_against_an_independent_version(rows, weighing, rejecting):
    trainer, behaviour = (np.array([row[i] for row in rows]) for i in (0, 1))
    samples = [row[2] for row in rows]
    options = [*weighing, *rejecting]
    expected = numpy_weights(trainer, behaviour, samples, options)
    found, metrics = correct(torch.tensor(trainer), torch.tensor(behaviour), torch.tensor(samples), corrections(*options))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_array_equal(metrics["masked"], expected == 0)


# In the loss


def loss_inputs(places: list[int] | None = None) -> LossInputs:
    at = torch.tensor(range(5) if places is None else places)
    return LossInputs(
        logprobs=(TRAINER[at] + 0.1).float().requires_grad_(),
        old_logprobs=TRAINER[at].float(),
        behaviour_logprobs=BEHAVIOUR[at].float(),
        reference_logprobs=(TRAINER[at] - 0.3).float(),
        advantages=torch.tensor([1.0, -2.0, 1.0, -2.0, 3.0])[at],
        samples=SAMPLES[at],
        trajectories=SAMPLES[at],
    )


TIS = {"kind": "truncate", "level": "token", "upper": 1.5}


def grpo(*options: dict[str, Any], **others: Any) -> GrpoConfig:
    return GrpoConfig.model_validate({"corrections": list(options), **others})


def test_the_loss_of_each_token_is_weighed_and_so_is_its_gradient():
    """The clipped ratio is live over old, e^0.1 here; the weight is old over behaviour, and a constant to the gradient."""
    plain, weighed = loss_inputs(), loss_inputs()
    expected = grpo_loss(plain, grpo()).per_token
    output = grpo_loss(weighed, grpo(TIS))
    factors = torch.tensor([1.5, 0.5, 1, 1.5, 0.5])
    torch.testing.assert_close(output.per_token, factors * expected)
    (before,) = torch.autograd.grad(expected.sum(), plain.logprobs)
    (after,) = torch.autograd.grad(output.per_token.sum(), weighed.logprobs)
    torch.testing.assert_close(after, factors * before)
    torch.testing.assert_close(output.metrics["weight"], factors)
    assert {"weight", "truncated", "masked"} <= set(output.metrics)
    assert all(not metric.requires_grad and metric.dtype == torch.float32 for metric in output.metrics.values())


def test_the_kl_term_is_not_weighed():
    """As in IcePop's objective: what pulls to the reference holds for every token."""
    gone = {"kind": "reject", "level": "token", "lower": 0.99, "upper": 1.01}  # no sample of the three is so close
    output = grpo_loss(loss_inputs(), grpo(gone, kl_coefficient=0.5))
    torch.testing.assert_close(output.per_token, 0.5 * output.metrics["kl"])
    assert (output.per_token > 0).all()


def test_without_mismatch_no_correction_changes_a_bit():
    inputs = loss_inputs()
    same = replace(inputs, behaviour_logprobs=inputs.old_logprobs, reference_logprobs=None)
    for level in ("token", "geometric", "sequence"):
        bounds = {"level": level, "lower": 1.0, "upper": 1.0}
        for kind in ("truncate", "mask", "reject"):
            options = grpo({"kind": kind, **bounds})
            assert torch.equal(grpo_loss(same, options).per_token, grpo_loss(same, grpo()).per_token)


@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
def test_any_division_into_microbatches_gives_the_same_losses(level: str):
    """Samples stay whole; which others are in the microbatch, and in which order, is all one."""
    options = grpo({"kind": "truncate", "level": level, "upper": 1.7}, {"kind": "reject", "level": level, "lower": 0.6})
    whole = grpo_loss(loss_inputs(), options).per_token
    assert len(set(whole.tolist())) > 2
    for division in ([[0, 2], [1, 3], [4]], [[4, 3, 1], [2, 0]], [[3, 4, 0, 2, 1]]):
        for places in division:
            torch.testing.assert_close(grpo_loss(loss_inputs(places), options).per_token, whole[places], rtol=1e-6, atol=0)


# In a backend


def plain_logprobs(model: Any, sample: Sample) -> torch.Tensor:
    """Log-probabilities of the loss tokens of one sample, by transformers, at the temperature of the run file."""
    tokens_T = torch.from_numpy(sample.tokens_T).long()
    logs_TV = (model(input_ids=tokens_T[None]).logits[0, :-1] / 0.8).log_softmax(-1)
    return logs_TV.gather(1, tokens_T[1:, None])[torch.from_numpy(sample.loss_mask_T)[1:], 0]


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_step_of_the_backend_equals_a_plain_pytorch_one(path: str, kl_in: str):
    """Trainer log-probabilities of the first forward, or of the pass before it (which a KL term in the reward asks for)."""
    options = [{"kind": "truncate", "level": "geometric", "upper": 1.2}, {"kind": "reject", "level": "token", "lower": 0.05}]
    algorithm = {"name": "grpo", "corrections": options, "kl_coefficient": 1e-9, "kl_in": kl_in}
    config = make_config(path, algorithm=algorithm, train={"clip_norm": 1e6})
    batch = BATCHES[0]
    advantages = [float(i) - 3 for i in range(len(batch.samples))]
    report = train(make_backend(config), config, [batch], advantages)[0].report()

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logs = [plain_logprobs(model, sample) for sample in batch.samples]
    behaviour = np.concatenate([s.behaviour_logprobs_T[s.loss_mask_T] for s in batch.samples])
    samples = [i for i, own in enumerate(logs) for _ in own]
    expected = numpy_weights(torch.cat(logs).detach().numpy(), behaviour, samples, options)
    assert 0 < (expected == 0).mean() < 1
    loss = -(torch.from_numpy(expected) * torch.tensor([advantages[i] for i in samples]) * torch.cat(logs)).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert report["policy/weight"] == pytest.approx(expected.mean(), rel=1e-5)
    assert report["policy/masked"] == pytest.approx((expected == 0).mean())
    assert report["update/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# In the run file


MINIMAL = {"run": {"steps": 3}, "model": {"path": "m"}}


def loaded(*options: dict[str, Any], **others: Any):
    return load_config({**MINIMAL, "algorithm": {"name": "grpo", "corrections": list(options), **others}})


def test_the_run_file_reads_back():
    config = loaded(TIS, {"kind": "reject", "level": "geometric", "lower": 0.99, "upper": 1.01})
    assert load_config(yaml.safe_load(dump_config(config))) == config
    given = load_config(MINIMAL, ["algorithm.name=grpo", "algorithm.corrections=[{kind: mask, level: token, lower: 0.5, upper: 5}]"])
    assert yaml.safe_load(dump_config(given))["algorithm"]["corrections"] == [MASK]


MASK = {"kind": "mask", "level": "token", "lower": 0.5, "upper": 5.0}


@pytest.mark.parametrize(
    ("options", "others", "message"),
    [
        ([TIS], {"old_logprobs": "behaviour"}, r"algorithm\.corrections and algorithm\.old_logprobs=behaviour: .*it would count twice"),
        ([TIS, MASK], {}, r"has truncate and mask, each of which weighs by the ratio: it would count 2 times"),
        ([TIS, {**TIS, "upper": 0.9}], {}, r"number 2 \(truncate, token\): upper is 0\.9, but .* have the ratio 1"),
        ([{**MASK, "lower": 1.1}], {}, r"number 1 \(mask, token\): lower is 1\.1, but .* have the ratio 1"),
        ([{**TIS, "lower": 0.1}], {}, r"truncate has no lower bound"),
        ([{"kind": "mask", "level": "token", "lower": 0.5}], {}, r"upper is required"),
        ([{"kind": "reject", "level": "geometric"}], {}, r"reject needs lower, upper or both"),
        ([{**TIS, "uper": 1}], {}, r"unknown option algorithm\.corrections number 1: uper; valid here: kind, level, lower, upper"),
        ([TIS, {**TIS, "kind": "clip"}], {}, r"algorithm\.corrections number 2: kind: .*'truncate', 'mask' or 'reject'"),
        ([{"kind": "truncate", "upper": 2}], {}, r"algorithm\.corrections number 1: level is required"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(options: list[dict[str, Any]], others: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        loaded(*options, **others)


def test_demonstrations_have_no_ratios():
    with pytest.raises(
        ConfigError, match=r"unknown option algorithm\.corrections, which sft does not have; it is an option of: grpo, dr_grpo"
    ):
        load_config({**MINIMAL, "algorithm": {"name": "sft", "corrections": [TIS]}})
