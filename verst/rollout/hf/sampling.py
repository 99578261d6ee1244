"""Sampling of one token for each row of logits, in the same way on every device.

Randomness is a function of (seed, position), so a row's token depends on no other row and on nothing drawn before: its uniform number
picks from the row's cumulative distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verst.exact.head import row_logs, row_sums

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position), by two rounds of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable PRNGs")."""
    keys = mix64(seeds + _GAMMA)
    words = mix64(keys + positions.astype(np.uint64) * _GAMMA)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of 64-bit words that scatters neighbouring inputs."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling settings of R rows as columns `[R, 1]`. Filters that are off hold values that keep every token."""

    factor: torch.Tensor  # 1 / temperature, rounded once as the trainer's is; 1 where greedy
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    greedy: torch.Tensor  # [R], bool
    any_filter: bool
    any_greedy: bool

    @classmethod
    def of(
        cls,
        temperature: NDArray[np.floating],
        top_p: NDArray[np.float32],
        top_k: NDArray[np.int64],
        min_p: NDArray[np.float32],
        device: torch.device,
    ) -> RowSampling:
        """From arrays `[R]` with the meaning they have in `Sampling`."""

        def column(values: NDArray[np.generic]) -> torch.Tensor:
            return torch.tensor(values).to(device)[:, None]  # a copy: the arrays change under way

        greedy = temperature == 0
        filters = (top_p < 1) | (top_k > 0) | (min_p > 0)
        return cls(
            factor=column((1 / np.where(greedy, 1.0, temperature)).astype(np.float32)),
            # A rounded cumulative sum may reach 1 before the last token; above 1 means that no token is ever cut.
            top_p=column(np.where(top_p < 1, top_p, 2.0)),
            top_k=column(np.where(top_k > 0, top_k, np.iinfo(np.int64).max)),
            min_p=column(min_p),
            greedy=column(greedy)[:, 0],
            any_filter=bool((filters & ~greedy).any()),
            any_greedy=bool(greedy.any()),
        )


def sample(logits_RV: torch.Tensor, rows: RowSampling, uniforms_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[R]` and their log-probabilities `[R]` (float32) under the distribution sampled: after temperature and filters.

    A greedy row takes the most likely token with log-probability 0. A filter needs a sort of all rows, and leaves the bits of rows
    without filters as they are.
    """
    scaled = logits_RV.float() * rows.factor
    if rows.any_filter:
        scaled = filtered(scaled, rows)
    # softmax, not exp of a log-softmax: a kernel by rows, so that no row gets other bits by its place in the tensor.
    # float64, or tokens less likely than 2**-24 could never be drawn at the end of the sum.
    cumulative = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the first larger entry exists and belongs to a token of positive probability.
    drawn = torch.minimum(uniforms_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # The clamp is for rows that are not finite: their log-probability then is not either, and the caller sees it.
    tokens = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=logits_RV.shape[-1] - 1)
    tokens = tokens[:, 0]
    top, total, _, target = row_sums(scaled, tokens, 1.0)  # as the trainer does
    found = target - (top + row_logs(total))
    if rows.any_greedy:
        tokens = torch.where(rows.greedy, scaled.argmax(-1), tokens)
        found = torch.where(rows.greedy, 0.0 * found, found)
    return tokens, found


def filtered(scaled_RV: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Logits with -inf for tokens that top-k, then top-p, then min-p remove; tokens tied with the last one kept are kept.

    The order is that of transformers: top-p (Holtzman et al. 2020) measures the distribution that top-k left; min-p
    (arXiv 2407.01082) compares with the most likely token.
    """
    ordered = scaled_RV.sort(dim=-1, descending=True).values
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    keep = rank < rows.top_k
    probs = ordered.double().softmax(-1) * keep
    probs = probs / probs.sum(-1, keepdim=True)
    keep &= probs.cumsum(-1) - probs < rows.top_p
    keep &= probs >= rows.min_p * probs[:, :1]
    last = keep.sum(-1, keepdim=True).clamp(min=1) - 1
    return scaled_RV.masked_fill(scaled_RV < ordered.gather(-1, last), -torch.inf)
