"""Rewards written for other frameworks, by the prefix of their reference: `trl:module:function`, `slime:module:function`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from verst.errors import ExtensionError
from verst.extend import check_callable, load
from verst.on_paper import stand_in
from verst.protocols import Reward
from verst.rewards import slime, trl
from verst.slime_api import make_importable

_CHECKS = {"trl": trl.check_signature, "slime": slime.check_signature}


def parts(reference: str) -> tuple[str, Sequence[str]] | None:
    """The framework and its functions' references; None for a reference of Verst's own."""
    prefix, _, rest = reference.partition(":")
    if prefix not in _CHECKS or ":" not in rest:
        return None  # a module may have that name
    return prefix, rest.split(trl.SEVERAL) if prefix == "trl" else [rest]


def build(framework: str, references: Sequence[str], options: Mapping[str, Any], model: str | None = None) -> Any:
    """The reward, ready to call. `model`: the policy's directory.

    Raises `ExtensionError` for what cannot be imported, does not fit, or an option that is unknown.
    """
    if framework == "slime":
        make_importable()
        function = load(references[0], shipped={}, kind="reward")
        _require_function(references[0], function)
        return slime.adapt(references[0], function, options, model)
    functions = {reference: load(reference, shipped={}, kind="reward") for reference in references}
    for reference, function in functions.items():
        _require_function(reference, function)
    check_options(framework, options)
    return trl.adapt(functions, **options)


def check_options(framework: str, options: Mapping[str, Any]) -> None:
    """Raises `ExtensionError` for options that the adapter does not have. Those of slime are `args`, and may be any."""
    if framework == "trl":
        check_callable(trl.adapt, "reward", ("functions",), options)


def check_on_paper(framework: str, reference: str) -> None:
    """Raises `ExtensionError` if the source of the function says that it is not there or does not fit. Imports nothing."""
    found = stand_in(reference, "reward", Reward)
    if found is not None:
        _require_function(reference, found)
        _CHECKS[framework](reference, inspect.signature(found))


def _require_function(reference: str, function: Any) -> None:
    if not callable(function) or inspect.isclass(function):
        raise ExtensionError(f"reward {reference!r} is {function!r} of type {type(function).__name__}: give a function")
