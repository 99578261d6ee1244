"""Contracts of a user's own advantages and loss, to be run on them in one call; `verst.testing` has them under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.fields import Field, Opaque, plain
from verst.types import Sample

if TYPE_CHECKING:
    from verst.algorithms.losses import LossInputs


def check_advantages(function: Any, *, groups: int = 3, members: int = 4, seed: int = 0) -> NDArray[np.float64]:
    """The contract of `algorithm.advantages`, run on yours, with random rewards and samples. Returns its advantages [groups x members].

    Raises `ExtensionError` if it does not fit the call, raises, or returns anything but a finite number for each sample, and
    `AssertionError` if the same batch has other advantages the second time, or samples in another order have others.
    """
    from verst.algorithms.own import call_advantages, check_function

    check_function(function, "advantages")
    rng = np.random.default_rng(seed)
    groups_N = np.repeat(np.arange(groups), members)
    rewards_N = rng.integers(0, 3, len(groups_N)).astype(np.float64)
    samples = [_sample(i, int(group), float(rewards_N[i]), rng) for i, group in enumerate(groups_N)]
    first = call_advantages(function, rewards_N, groups_N, samples)
    assert np.array_equal(first, call_advantages(function, rewards_N, groups_N, samples)), "the same batch has other advantages now"
    order = rng.permutation(len(samples))
    moved = call_advantages(function, rewards_N[order], groups_N[order], [samples[i] for i in order])
    assert np.allclose(moved, first[order]), f"in another order its samples have other advantages: {moved} and {first[order]}"
    equal = np.ones_like(rewards_N)
    call_advantages(function, equal, groups_N, [replace(sample, reward=1.0) for sample in samples])  # as in a batch without signal
    return first


def check_loss(
    function: Any, *, samples: int = 3, tokens: int = 5, seed: int = 0, fields: Mapping[str, Callable[[int], Field]] | None = None
) -> float:
    """The contract of `algorithm.loss`, run on yours, with random log-probabilities. Returns the sum of its loss.

    `fields`: by name, what makes the field of a sample of so many tokens, for a loss that reads some.

    Raises `ExtensionError` if it does not fit the call, raises, or returns no loss for each token that can be differentiated, and
    `AssertionError` if loss or gradient is not finite, or the loss of a sample depends on the others in its microbatch.
    """
    import torch

    from verst.algorithms.losses import LossInputs
    from verst.algorithms.own import call_loss, check_function

    check_function(function, "loss")
    generator = torch.Generator().manual_seed(seed)
    count = samples * tokens

    def near(values_N: torch.Tensor) -> torch.Tensor:
        return values_N + 0.1 * torch.randn(count, generator=generator)

    of_N = torch.arange(samples).repeat_interleave(tokens)
    old_N = -3 * torch.rand(count, generator=generator) - 0.5
    advantages_N = torch.linspace(-1, 1, samples)[of_N]
    made = [{name: make(tokens) for name, make in (fields or {}).items()} for _ in range(samples)]
    whole = LossInputs(near(old_N).requires_grad_(), old_N, near(old_N), near(old_N), advantages_N, of_N, of_N, _given(made, tokens))
    output = call_loss(function, whole)
    output.per_token.sum().backward()
    assert torch.isfinite(output.per_token).all(), f"a loss that is not finite: {output.per_token.tolist()}"
    assert whole.logprobs.grad is not None
    assert torch.isfinite(whole.logprobs.grad).all(), f"a gradient that is not finite: {whole.logprobs.grad.tolist()}"
    for sample in range(samples):
        own_N = of_N == sample
        given = {name: values if isinstance(values, list) else values[own_N] for name, values in whole.fields.items()}
        alone = LossInputs(**{name: values[own_N].detach() for name, values in _tensors(whole).items()}, fields=given)
        alone.logprobs.requires_grad_()
        found = call_loss(function, alone).per_token
        assert torch.allclose(found, output.per_token[of_N == sample], atol=1e-6), (
            f"sample {sample} has another loss in another microbatch: {found.tolist()} and {output.per_token[of_N == sample].tolist()}"
        )
    return float(output.per_token.detach().sum())


def _tensors(inputs: LossInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in inputs.__dataclass_fields__ if name != "fields"}


def _given(made: Sequence[Mapping[str, Field]], tokens: int) -> dict[str, Any]:
    """As `verst.training.fields.loss_fields` has it."""
    import torch

    given: dict[str, Any] = {}
    for name in made[0]:
        values = [fields[name] for fields in made]
        if isinstance(values[0], Opaque):
            given[name] = [plain(value) for value in values]
        else:
            given[name] = torch.from_numpy(np.concatenate([np.full(tokens, plain(value), np.float32) for value in values]))
    return given


def _sample(index: int, group: int, reward: float, rng: np.random.Generator) -> Sample:
    length = int(rng.integers(4, 9))
    mask_T = np.arange(length) >= 2
    logprobs_T = np.where(mask_T, -rng.random(length), 0.0).astype(np.float32)
    return Sample(
        f"{group}/{index}", group, rng.integers(0, 50, length).astype(np.int32), mask_T, logprobs_T, np.zeros(length, np.int32), reward
    )
