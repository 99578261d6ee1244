"""Rewards written for other frameworks, by the prefix of their reference: `trl:module:function`, `slime:module:function`."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from verst.errors import ExtensionError
from verst.extend import check_callable, load
from verst.rewards import slime, trl
from verst.slime_api import make_importable

_CHECKS = {"trl": trl.check_signature, "slime": slime.check_signature}


def parts(reference: str) -> tuple[str, Sequence[str]] | None:
    """The framework and its functions' references; None for a reference of Verst's own."""
    prefix, _, rest = reference.partition(":")
    if prefix not in _CHECKS or ":" not in rest:
        return None  # a module may have that name
    return prefix, rest.split(trl.SEVERAL) if prefix == "trl" else [rest]


def build(framework: str, references: Sequence[str], options: Mapping[str, Any]) -> Any:
    """The reward, ready to call. Raises `ExtensionError` for what cannot be imported, does not fit, or an option that is unknown."""
    if framework == "slime":
        make_importable()
        function = load(references[0], shipped={}, kind="reward")
        _require_function(references[0], function)
        return slime.adapt(references[0], function, options)
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
    """Raises `ExtensionError` if the source of the function says that it does not fit. Imports nothing.

    What is not a plain `def` at the top of its module is checked when it is loaded.
    """
    module, _, name = reference.partition(":")
    source = _source(module)
    found = [node for node in ast.parse(source.read_bytes()).body if getattr(node, "name", None) == name] if source else []
    if found and isinstance(found[-1], ast.FunctionDef | ast.AsyncFunctionDef) and not found[-1].decorator_list:
        _CHECKS[framework](reference, _signature(found[-1].args))


def _require_function(reference: str, function: Any) -> None:
    if not callable(function) or inspect.isclass(function):
        raise ExtensionError(f"reward {reference!r} is {function!r} of type {type(function).__name__}: give a function")


def _source(module: str) -> Path | None:
    path, spec = [os.getcwd()], None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, path) or (PathFinder.find_spec(part) if path == [os.getcwd()] else None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


class _Source(str):
    """A default as it is written: in a signature it shows as that."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _default(node: ast.expr | None) -> Any:
    return inspect.Parameter.empty if node is None else _Source(ast.unparse(node))


def _signature(arguments: ast.arguments) -> inspect.Signature:
    kinds = inspect.Parameter
    positional = [(a, kinds.POSITIONAL_ONLY) for a in arguments.posonlyargs] + [(a, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    found = [kinds(a.arg, kind, default=_default(node)) for (a, kind), node in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=_default(default)))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)
