"""Advantages and a loss of a user's own, in the place of those that an algorithm has: `algorithm.advantages`, `algorithm.loss`.

Both are loaded where they are called, in the loop and in the trainer ranks, before the first step. What they return is checked each time:
it goes into gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst import extend
from verst.algorithms.losses import LossInputs, LossOutput, completed
from verst.algorithms.table import Algorithm
from verst.errors import ExtensionError
from verst.protocols import Advantages, Loss
from verst.types import Sample

_PARAMETERS = {"advantages": ("rewards_N", "groups_N", "samples"), "loss": ("inputs",)}
"""By the option that names the function, what it is called with."""


def own_advantages(options: Any) -> Advantages | None:
    """The function that `options.advantages` names, checked. Raises `ExtensionError`."""
    reference = getattr(options, "advantages", None)
    return None if reference is None else _loaded(reference, "advantages")


def check_function(function: Any, kind: str) -> None:
    """Raises `ExtensionError`, with the call that is made, if `algorithm.advantages` or `algorithm.loss` (`kind`) cannot be this one."""
    extend.check_callable(function, kind, _PARAMETERS[kind])
    expected = f"def {_name(function)}({', '.join(_PARAMETERS[kind])})"
    if inspect.isclass(function):
        raise ExtensionError(
            f"{kind} {_name(function)} is a class, and what it would make is no array: give a function; expected: {expected}"
        )
    if extend.is_async(function):
        raise ExtensionError(f"{kind} {_name(function)} is async, and nothing would wait for it: write a plain `def`; expected: {expected}")


def call_advantages(
    function: Advantages, rewards_N: NDArray[np.float64], groups_N: NDArray[np.int64], samples: Sequence[Sample]
) -> NDArray[np.float64]:
    """[N] what it returns. Raises `ExtensionError` if it raises, or returns anything but a finite number for each sample."""
    what = f"advantages {_name(function)}"
    returned = extend.guarded(lambda: function(rewards_N, groups_N, samples), what, ExtensionError)
    found = extend.guarded(lambda: np.asarray(returned, np.float64), f"{what} returned {returned!r:.80}, and NumPy", ExtensionError)
    if found.shape != (len(samples),):
        raise ExtensionError(f"{what} returned an array of shape {list(found.shape)}, not [{len(samples)}]: one number for each sample")
    if not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ExtensionError(f"{what} returned {found[first]} for sample {samples[first].id} with the reward {rewards_N[first]}")
    return found


def with_own_loss(algorithm: Algorithm, options: Any) -> Algorithm:
    """The algorithm with the loss that `options.loss` names, if it names one: corrections weigh it, and a KL term is added.

    Raises `ExtensionError`.
    """
    reference = getattr(options, "loss", None)
    if reference is None:
        return algorithm
    function = _loaded(reference, "loss")

    def loss(inputs: LossInputs, options: Any) -> LossOutput:
        output = call_loss(function, inputs)
        return completed(inputs, options, output.per_token, output.metrics)

    return replace(algorithm, loss=loss)


def call_loss(function: Loss, inputs: LossInputs) -> LossOutput:
    """What it returns, as a `LossOutput`. Raises `ExtensionError` if it raises, or returns no loss [N] that can be differentiated."""
    import torch

    what = f"loss {_name(function)}"
    returned = extend.guarded(lambda: function(inputs), what, ExtensionError)
    output = returned if isinstance(returned, LossOutput) else LossOutput(returned, {})
    shape = inputs.logprobs.shape
    for name, values in {"per_token": output.per_token, **output.metrics}.items():
        if not isinstance(values, torch.Tensor) or values.shape != shape:
            given = list(values.shape) if isinstance(values, torch.Tensor) else extend.described(values)
            raise ExtensionError(
                f"{what} returned {name} {given}, not a tensor of shape {list(shape)}: one value for each token, not their mean"
            )
    if inputs.logprobs.requires_grad and not output.per_token.requires_grad:
        raise ExtensionError(f"{what} returned a loss that does not depend on inputs.logprobs, the only input that has a gradient")
    return LossOutput(output.per_token, {name: values.detach() for name, values in output.metrics.items()})


@lru_cache
def _loaded(reference: str, kind: str) -> Any:
    function = extend.load(reference, shipped={}, kind=kind)
    check_function(function, kind)
    return function


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
