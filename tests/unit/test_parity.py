"""The parity benchmark: what it compares is what it says, and its table has every answer and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.parity import (
    SEQUENCES,
    Found,
    Orders,
    ask_trainer,
    config_of,
    differences,
    norms,
    report,
    sequences,
    trainer_cases,
    write_model,
)


def test_a_trainer_agrees_with_transformers_and_a_wrong_number_is_seen(tmp_path: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    write_model(tmp_path / "qwen3", "qwen3", cuda=False)
    orders = Orders("fsdp", ["qwen3"], "float32", "cpu", str(tmp_path), {})
    found = Found()
    ask_trainer(orders, config_of(orders.model("qwen3"), "float32"), found)
    torch.set_num_threads(before)
    assert [len(tokens) for tokens in found.tokens] == [len(tokens) for tokens in sequences()]
    assert found.gradient_norm is not None
    assert found.gradient_norm > 0.1
    key = ("qwen3", "fsdp, one rank")
    mean, largest = differences({key: found}, tmp_path, "float32", "cpu")[key]
    assert 0 <= mean <= largest < 1e-5
    found.logprobs[2][5] += 0.25
    found.logprobs[3][0] += 9.0  # before the first that counts
    mean, largest = differences({key: found}, tmp_path, "float32", "cpu")[key]
    assert largest == pytest.approx(0.25, abs=1e-5)
    assert mean == pytest.approx(0.25 / sum(len(tokens) - 1 for tokens in sequences()), abs=1e-5)


def test_gradient_norms_are_compared_with_one_rank_of_fsdp():
    results = {
        ("a", "fsdp, one rank"): Found(gradient_norm=2.0),
        ("a", "megatron, TP2"): Found(gradient_norm=2.5),
        ("a", "sglang, scoring"): Found(),
        ("b", "megatron, TP2"): Found(gradient_norm=1.0),  # nothing to compare with
    }
    assert norms(results) == {("a", "megatron, TP2"): pytest.approx(0.25)}


def test_the_table_has_every_answer_and_every_refusal_with_its_reason():
    answered = Found(tokens=[np.zeros(2, np.int32)])
    results = {
        ("a", "hf, scoring"): answered,
        ("b", "hf, scoring"): Found(refused="no kernel"),
        ("b", "sglang"): Found(refused="no kernel"),
    }
    lines = report(results, {("a", "hf, scoring"): (1e-7, 2.5e-6)}, ["a", "b"])
    assert lines[:4] == [
        "| log-probabilities | a | b |",
        "|---|---|---|",
        "| hf, scoring | 1.0e-07 / 2.5e-06 | refused (1) |",
        "| sglang |  | refused (1) |",
    ]
    assert lines[-1] == "(1) no kernel"


def test_layouts_of_a_family_are_those_it_can_have():
    def cases(family: str, world: int) -> list[str]:
        return [name for name, _ in trainer_cases(Orders("megatron", [family], "float32", "cpu", "", {}, 0, world), family)]

    assert cases("qwen3", 1) == ["megatron, one rank"]
    assert cases("qwen3", 2) == [f"megatron, {layout}2" for layout in ("TP", "PP", "CP", "DP")]
    assert "megatron, EP2" in cases("deepseek_v3", 2)
    assert len(sequences()) == SEQUENCES
