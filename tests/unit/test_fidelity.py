"""What is measured of the mismatch between engine and trainer, and what is done about it."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.algorithms.fidelity import mismatch_tokens, tally_fidelity, tally_mismatch, tally_sequences
from verst.config.schema import Config
from verst.errors import TrainingDiverged
from verst.observe.limits import FidelityWatch
from verst.observe.metrics import Tally, merged
from verst.observe.report import summary
from verst.observe.terminal import step_line
from verst.runtime.observer import fidelity_watch
from verst.types import NO_VERSION

# The effective sample size


def test_effective_sizes_merge_before_they_are_divided():
    # Weights 1 1 on one rank and 2 on another: (1 + 1 + 2)² / (3 · (1 + 1 + 4)) = 16 / 18. Each alone is 1, and so is any mean of them.
    a, b = Tally(), Tally()
    a.effective("ess", 2, 2.0, 2.0)
    b.effective("ess", 1, 2.0, 4.0)
    assert (a.report(), b.report()) == ({"ess": 1.0}, {"ess": 1.0})
    assert merged([a, b]).report() == {"ess": pytest.approx(16 / 18)}
    assert pickle.loads(pickle.dumps(merged([a, b]))).report() == {"ess": pytest.approx(16 / 18)}


def test_an_effective_size_of_nothing_is_unknown():
    tally = Tally()
    tally.effective("ess", 0, 0.0, 0.0)
    assert tally.report() == {}


# Tokens


def test_the_moments_of_ratios_worked_by_hand():
    # Ratios 2, 1, ¼. χ²: (1 + 0 + 9/16) / 3. ESS: (3.25)² / (3 · (4 + 1 + 1/16)) = 10.5625 / 15.1875.
    tally = Tally()
    tally_mismatch(tally, np.log([0.5, 0.25, 0.1]), np.log([0.25, 0.25, 0.4]))
    assert tally.report()["mismatch/chi2"] == pytest.approx(25 / 48)
    assert tally.report()["mismatch/ess"] == pytest.approx(10.5625 / 15.1875)


def test_chi_squared_is_that_of_the_distributions_and_fixes_the_effective_size():
    # Exact expectation, each word as often as the behaviour policy draws it. χ² = Σ trainer² / behaviour − 1; the mean ratio is 1, so
    # that the share is 1 / (1 + χ²).
    behaviour, trainer = np.array([0.1, 0.3, 0.6]), np.array([0.2, 0.3, 0.5])
    words = np.repeat([0, 1, 2], [100, 300, 600])
    tally = Tally()
    tally_mismatch(tally, np.log(trainer)[words], np.log(behaviour)[words])
    chi2 = float((trainer**2 / behaviour).sum() - 1)
    assert tally.report()["mismatch/chi2"] == pytest.approx(chi2)
    assert tally.report()["mismatch/ess"] == pytest.approx(1 / (1 + chi2))


def test_near_agreement_chi_squared_is_not_lost_in_rounding():
    delta = np.full(4, 1e-9)
    tally = Tally()
    tally_mismatch(tally, delta, np.zeros(4))
    assert tally.report()["mismatch/chi2"] == pytest.approx(1e-18, rel=1e-6)


# Ages and samples


def test_tokens_are_measured_by_the_age_of_their_version():
    # Version 7 trains. Δ is the age + 1; the prompt's token (no version) would be 100.
    versions = np.array([7, 6, 6, 5, 4, 3, 0, NO_VERSION], np.int32)
    delta = np.array([1, 2, 2, 3, 4, 5, 8, 100], np.float32)
    tally = Tally()
    tally_fidelity(tally, delta, np.zeros(8, np.float32), versions_N=versions, samples_N=np.zeros(8, np.int64), version=7)
    report = tally.report()
    expected = {"mismatch": 1, "mismatch/age_1": 2, "mismatch/age_2": 3, "mismatch/age_3": 4, "mismatch/older": 6.5, "stale_mismatch": 4}
    assert {name.removesuffix("/abs_mean"): value for name, value in report.items() if name.endswith("/abs_mean")} == expected
    counts = {name: mismatch_tokens(tally, name=name) for name in ("mismatch", "mismatch/age_1", "mismatch/older", "stale_mismatch")}
    assert counts == {"mismatch": 1, "mismatch/age_1": 2, "mismatch/older": 2, "stale_mismatch": 6}
    assert report["stale_mismatch/abs_max"] == 8


def test_an_age_that_no_token_has_is_not_reported():
    tally = Tally()
    tally_fidelity(tally, np.zeros(2), np.zeros(2), versions_N=np.array([3, 3]), samples_N=np.array([0, 1]), version=3)
    names = {name.rsplit("/", 1)[0] for name in tally.report()}
    assert names == {"mismatch", "sequences"}


def test_the_effective_size_of_samples_worked_by_hand():
    # Sample 8: ratios 2, 2: product 4, mean 2. Sample 3: ratio 1. They interleave.
    # Products: (4 + 1)² / (2 · (16 + 1)) = 25 / 34. Means: (2 + 1)² / (2 · (4 + 1)) = 9 / 10.
    tally = Tally()
    tally_sequences(tally, np.log([2.0, 1.0, 2.0]), np.zeros(3), np.array([8, 3, 8]))
    assert tally.report() == {"sequences/ess_product": pytest.approx(25 / 34), "sequences/ess_geometric": pytest.approx(0.9)}


def test_one_sample_that_outweighs_all_others_is_one_of_so_many():
    """Its product e⁴⁰⁰⁰ is beyond float64."""
    delta, samples = np.concatenate([np.full(8000, 0.5), np.zeros(9)]), np.concatenate([np.zeros(8000), np.arange(1, 10)]).astype(np.int64)
    tally = Tally()
    tally_sequences(tally, delta, np.zeros(8009), samples)
    assert tally.report()["sequences/ess_product"] == pytest.approx(0.1)


def numpy_fidelity(trainer, behaviour, ages, samples):
    """An independent version of every share: one pass over Python numbers for each."""
    ratios = np.exp(trainer - behaviour)
    found = {}
    for name, chosen in {
        "mismatch": ages == 0,
        "stale_mismatch": ages > 0,
        "mismatch/age_2": ages == 2,
        "mismatch/older": ages > 3,
    }.items():
        if chosen.any():
            r = ratios[chosen]
            found[f"{name}/chi2"] = sum((x - 1) ** 2 for x in r) / len(r)
            found[f"{name}/ess"] = sum(r) ** 2 / (len(r) * sum(x * x for x in r))
    products = [np.prod(ratios[samples == s]) for s in set(samples)]
    means = [np.prod(ratios[samples == s]) ** (1 / (samples == s).sum()) for s in set(samples)]
    for name, w in (("product", products), ("geometric", means)):
        found[f"sequences/ess_{name}"] = sum(w) ** 2 / (len(w) * sum(x * x for x in w))
    return found


@given(
    st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_fidelity_does_not_depend_on_which_rank_has_which_sample(rows, rank_of_sample):
    trainer, behaviour = (np.array([row[i] for row in rows]) for i in (0, 1))
    ages, samples = (np.array([row[i] for row in rows]) for i in (2, 3))
    parts = []
    for rank in range(3):
        own = np.array([rank_of_sample[s] == rank for s in samples])
        parts.append(Tally())
        tally_fidelity(parts[-1], trainer[own], behaviour[own], versions_N=9 - ages[own], samples_N=samples[own], version=9)
    report = merged(parts).report()
    expected = numpy_fidelity(trainer, behaviour, ages, samples)
    assert {name: report.get(name) for name in expected} == pytest.approx(expected, rel=1e-9)


def test_broken_log_probabilities_show_in_every_share():
    tally = Tally()
    tally_fidelity(
        tally, np.array([-1.0, np.nan]), np.array([-1.0, -1.0]), versions_N=np.zeros(2, int), samples_N=np.zeros(2, int), version=0
    )
    report = tally.report()
    for name in ("mismatch/chi2", "mismatch/ess", "mismatch/k3", "sequences/ess_product", "sequences/ess_geometric"):
        assert math.isnan(report[name]), name


# Limits


def watched(watch: FidelityWatch, *values: float, name: str = "mismatch/k3") -> list[int]:
    """How many lines each step has."""
    return [len(watch.check(step, {name: value})) for step, value in enumerate(values, start=1)]


def test_a_warning_comes_once_and_again_when_it_has_doubled():
    assert watched(FidelityWatch(0.01, "warn"), 0.005, 0.01, 0.02, 0.02, 0.005, 0.03, 0.04, 0.041, 0.041) == [0, 0, 1, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_divergence_that_is_no_number_is_past_every_limit_and_told_once(broken: float):
    assert watched(FidelityWatch(0.01, "warn"), broken, broken) == [1, 0]
    with pytest.raises(TrainingDiverged):
        FidelityWatch(1e9, "stop").check(1, {"mismatch/k3": broken})


def test_the_warning_names_metric_value_and_limit():
    (line,) = FidelityWatch(0.01, "warn").check(4, {"mismatch/age_1/k3": 0.25})
    assert "mismatch/age_1/k3 of step 4 is 2.50e-01 nats a token" in line
    assert "the policy has moved that far" in line  # not the engine's error alone
    (line,) = FidelityWatch(0.01, "warn").check(4, {"mismatch/k3": 0.25, "mismatch/abs_mean": 9.0})
    assert line.startswith("warning: mismatch/k3 of step 4 is 2.50e-01 nats a token, above fidelity.limit (0.01)")


def test_stopping_says_what_is_durable_and_how_to_go_on():
    watch = FidelityWatch(0.01, "stop")
    assert watch.check(4, {"mismatch/k3": 0.01}) == []
    with pytest.raises(
        TrainingDiverged, match=r"mismatch/k3 of step 5 is 2\.00e-02 .*step 4 is the last commit.*verst resume.*action=warn"
    ):
        watch.check(5, {"mismatch/k3": 0.02})


def test_the_newest_tokens_decide_because_older_ones_differ_by_what_was_learned():
    watch = FidelityWatch(0.01, "stop")
    assert watch.check(1, {"mismatch/k3": 0.001, "mismatch/age_1/k3": 0.5}) == []
    assert watch.check(2, {"mismatch/age_2/k3": 0.001, "mismatch/older/k3": 0.5}) == []
    with pytest.raises(TrainingDiverged, match="mismatch/age_1/k3 of step 3"):
        watch.check(3, {"mismatch/age_1/k3": 0.5, "mismatch/age_2/k3": 0.001})
    assert watch.check(4, {"loss/total": 1.0}) == []  # nothing was sampled


def test_routes_that_are_not_replayed_are_told_once_with_what_was_measured():
    watch = FidelityWatch(0.01, "warn", unreplayed="record")
    assert watch.check(1, {"loss/total": 1.0}) == []
    (line,) = watch.check(2, {"mismatch/k3": 0.002})
    assert "train.routes is record" in line
    assert "mismatch/k3 of step 2 is 2.00e-03" in line
    assert watch.check(3, {"mismatch/k3": 0.002}) == []


MOE = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
DENSE = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("about", "routes", "algorithm", "lines"),
    [
        (MOE, "ignore", "grpo", 1),
        (MOE, "record", "grpo", 1),
        (MOE, "replay", "grpo", 0),
        (DENSE, "ignore", "grpo", 0),
        (MOE, "ignore", "sft", 0),
    ],
)
def test_only_a_model_with_experts_that_samples_can_miss_its_routes(
    tmp_path: Path, about: dict[str, Any], routes: str, algorithm: str, lines: int
):
    (tmp_path / "config.json").write_text(json.dumps(about))
    values = {"run": {"steps": 1}, "model": {"path": str(tmp_path)}, "train": {"routes": routes}, "algorithm": {"name": algorithm}}
    watch = fidelity_watch(Config.model_validate(values))
    assert len(watch.check(1, {"mismatch/k3": 0.001})) == lines


# What a person sees

ROW = {"kind": "step", "step": 2, "time/step_s": 1.0, "mismatch/k3": 0.00123, "mismatch/abs_max": 0.5}


def test_the_line_and_the_summary_show_divergence_and_routes():
    assert step_line(2, 5, ROW) == "step 2/5  mismatch k3 1.2e-03  1.00 s ()"
    assert "routes differ 3.1%" in step_line(2, 5, ROW | {"routes/differ": 0.031})
    assert summary([ROW])[1].startswith("largest mismatch 5.00e-01, k3 at most 1.2e-03, staleness")
    rows = [ROW | {"routes/differ": 0.02}, ROW | {"routes/differ": 0.031, "mismatch/k3": 0.001}]
    assert "k3 at most 1.2e-03, routes that differ at most 3.10%" in summary(rows)[1]
