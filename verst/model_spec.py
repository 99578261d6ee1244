"""Models that transformers, or Verst, does not know: `model.spec: module:object`.

A spec is installed in each process that loads the model, before it does: transformers then builds it as any other, and what reads names or
routes of a model asks here first. Most processes of a run load no model, and never import the user's module.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

from verst import extend
from verst.errors import ExtensionError
from verst.protocols import ModelSpec

_CALLS = {"checkpoint_name": ("parameter",), "moe": ("config",), "megatron_family": ()}
"""A spec's methods, and what each is called with."""

_INSTALLED: dict[str, tuple[Any, ModelSpec]] = {}


def install(reference: Any) -> ModelSpec | None:
    """Makes a spec known to this process: by `module:object`, or the object or class itself. None, and nothing happens, if there is none.

    Raises `ExtensionError` for what cannot be imported or is no spec.
    """
    if reference is None:
        return None
    for name, (known, spec) in _INSTALLED.items():
        if known == reference and name == spec.model_type:
            return spec
    found = extend.load(reference, shipped={}, kind="model spec")
    spec: Any = extend.guarded(found, "model spec", ExtensionError) if inspect.isclass(found) else found
    _check(spec)
    _register(spec)
    _INSTALLED[spec.model_type] = (reference, spec)
    return spec


def installed(model_type: Any) -> ModelSpec | None:
    """The spec of a model with this `model_type` in its config.json, if one was installed in this process."""
    found = _INSTALLED.get(model_type) if isinstance(model_type, str) else None
    return None if found is None else found[1]


def published_name(model: Any, parameter: str) -> str:
    """The name by which a model's parameter or buffer is published and saved: its own, unless a spec gives it another one."""
    spec = installed(getattr(getattr(model, "config", None), "model_type", None))
    return parameter if spec is None else spec.checkpoint_name(parameter)


def key_mapping(config: Any) -> dict[str, str] | None:
    """What `from_pretrained` renames as it reads the files of a model with this config: patterns of their names, and the parameters'.

    Raises `ExtensionError` if the spec gives two of them one name.
    """
    spec = installed(config.model_type)
    if spec is None:
        return None
    import torch

    with torch.device("meta"):
        parameters = spec.model_class(config).state_dict()
    saved = {name: spec.checkpoint_name(name) for name in parameters}
    twice = [file for file, count in Counter(saved.values()).items() if count > 1]
    if twice:
        raise ExtensionError(f"model spec {spec!r:.80}: checkpoint_name gives several parameters the name {twice[0]}: give each its own")
    return {f"^{re.escape(file)}$": name for name, file in saved.items() if file != name} or None


def check_on_paper(found: Any) -> None:
    """Checks what stands in for a spec (`verst.on_paper`): of a class that it can be made, and the methods that it has. An object may have
    more, which its `__init__` sets. Raises `ExtensionError`.
    """
    if not inspect.isclass(found):
        _check(found)  # a function is none
        return
    extend.check_callable(found, "model spec", ())
    _check_calls(found())


def _check(spec: Any) -> None:
    what = f"model spec {spec!r:.80}"
    for name, expected in (("model_type", str), ("config_class", type), ("model_class", type)):
        if not isinstance(getattr(spec, name, None), expected):
            kind = "text" if expected is str else "class"
            raise ExtensionError(
                f"{what} has no {name}, or one that is no {kind}; expected: an object, or a class without arguments, with model_type, "
                "config_class and model_class, best a subclass of verst.protocols.ModelSpec"
            )
    if getattr(spec.model_class, "config_class", None) is not spec.config_class:
        raise ExtensionError(f"{what}: its model_class has another config_class: write `config_class = {spec.config_class.__name__}` in it")
    for name in _CALLS:
        if not hasattr(spec, name):
            raise ExtensionError(f"{what} has no method {name!r}: make it a subclass of verst.protocols.ModelSpec, which has one")
    _check_calls(spec)
    if getattr(spec.config_class, "model_type", None) != spec.model_type:
        raise ExtensionError(
            f"{what}: its config_class has the model_type {getattr(spec.config_class, 'model_type', None)!r}, not {spec.model_type!r}: "
            "give both the same"
        )


def _check_calls(spec: Any) -> None:
    for name, parameters in _CALLS.items():
        if hasattr(spec, name):
            extend.check_callable(getattr(spec, name), "model spec", parameters)


def _register(spec: ModelSpec) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(spec.model_type, spec.config_class, exist_ok=True)
    AutoModelForCausalLM.register(spec.config_class, spec.model_class, exist_ok=True)
