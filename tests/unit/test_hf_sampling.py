"""Sampling against an independent NumPy version, worked numbers, and the chi-square distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from verst.rollout.hf.sampling import RowSampling, mix64, sample, uniforms

CPU = torch.device("cpu")


def rows(count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> RowSampling:
    return RowSampling.of(
        np.full(count, temperature, np.float32),
        np.full(count, top_p, np.float32),
        np.full(count, top_k, np.int64),
        np.full(count, min_p, np.float32),
        CPU,
    )


def distribution(logits: NDArray[np.float32], temperature: float, top_p: float, top_k: int, min_p: float) -> NDArray[np.float64]:
    """The distribution by its definition, one token at a time, most likely first."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    probs = weights / weights.sum()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if top_k:
        ranked = ranked[:top_k]
    of_top_k = sum(probs[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token] / of_top_k
    kept = [token for token in kept if probs[token] >= min_p * probs[ranked[0]]]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def test_mix64_gives_the_published_splitmix64_sequence():
    # The first outputs for seed 1234567 of the reference implementation by Vigna (prng.di.unimi.it/splitmix64.c).
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * gamma) % 2**64 for n in (1, 2, 3)], np.uint64)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_over_seeds_and_over_positions_and_depend_on_nothing_else():
    seeds, positions = np.arange(100_000, dtype=np.uint64), np.zeros(100_000, np.int64)
    for drawn in (uniforms(seeds, positions), uniforms(positions.astype(np.uint64), seeds.astype(np.int64))):
        counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 149  # 99 degrees of freedom, p = 0.001
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / math.sqrt(len(drawn))
    alone = uniforms(np.array([77], np.uint64), np.array([5]))
    assert uniforms(np.array([1, 77], np.uint64), np.array([9, 5]))[1] == alone[0]


SETTINGS = [
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 0, "min_p": 0.0},
    {"temperature": 1.3, "top_p": 1.0, "top_k": 5, "min_p": 0.0},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.2},
    {"temperature": 1.5, "top_p": 0.7, "top_k": 9, "min_p": 0.15},
    {"temperature": 1.0, "top_p": 0.01, "top_k": 0, "min_p": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_frequencies_and_logprobs_follow_the_definition(settings: dict[str, float]):
    count = 40_000
    logits = np.random.default_rng(3).normal(size=20).astype(np.float32) * 1.5
    expected = distribution(logits, **settings)  # type: ignore[arg-type]
    drawn = torch.from_numpy(uniforms(np.arange(count, dtype=np.uint64), np.full(count, 7)))
    tokens, logprobs = sample(torch.from_numpy(logits).expand(count, -1), rows(count, **settings), drawn)  # type: ignore[arg-type]
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=2e-6)
    counts = np.bincount(tokens, minlength=20)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((counts - count * expected)[likely] ** 2 / (count * expected[likely])).sum()
    assert chi_square < 44  # 19 degrees of freedom, p = 0.001; fewer tokens give less


def test_rows_with_different_settings_share_a_batch_and_keep_their_bits():
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(8, 33)).astype(np.float32))
    drawn = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    plain_tokens, plain_logprobs = sample(logits, rows(8), drawn)
    mixed = RowSampling.of(
        np.array([1, 1, 0.5, 0, 1, 1, 1, 1], np.float32),
        np.array([1, 0.5, 1, 1, 1, 1, 1, 1], np.float32),
        np.array([0, 0, 0, 0, 3, 0, 0, 0], np.int64),
        np.array([0, 0, 0, 0, 0, 0.5, 0, 0], np.float32),
        CPU,
    )
    tokens, logprobs = sample(logits, mixed, drawn)
    untouched = [0, 6, 7]
    assert torch.equal(tokens[untouched], plain_tokens[untouched])
    assert torch.equal(logprobs[untouched], plain_logprobs[untouched])
    assert tokens[3] == logits[3].argmax()
    assert logprobs[3] == 0
    for row, settings in [(1, SETTINGS[2] | {"top_p": 0.5}), (4, SETTINGS[3] | {"temperature": 1.0, "top_k": 3})]:
        expected = distribution(logits[row].numpy(), **settings)  # type: ignore[arg-type]
        assert math.isclose(logprobs[row], math.log(expected[tokens[row]]), abs_tol=2e-6)


def test_the_largest_uniform_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf], [-torch.inf, 0.0, -200.0, -torch.inf]])
    tokens, logprobs = sample(logits, rows(2), torch.full((2,), 1 - 2**-53, dtype=torch.float64))
    assert tokens.tolist() == [1, 1]
    np.testing.assert_allclose(logprobs, [math.log(1 / (1 + math.e)), 0.0], atol=1e-6)


def test_unlikely_tokens_at_the_end_of_the_vocabulary_can_be_drawn():
    # 1e-9 is below the spacing of float32 near 1: a float32 running sum would lose this token.
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    tokens, logprobs = sample(logits, rows(1), torch.tensor([1 - 1e-10], dtype=torch.float64))
    assert tokens.tolist() == [1]
    assert math.isclose(logprobs[0], math.log(1e-9), rel_tol=1e-6)
