"""User code by name: `module:function` or a shipped name, checked before anything runs on it.

A mistake in a run file should cost seconds, not the first hour of a run. So what is loaded here is also called on paper: its signature must
take what Verst will pass.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from verst.errors import ExtensionError, VerstError

T = TypeVar("T")

_OWN = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def load(reference: Any, *, shipped: Mapping[str, Any], kind: str) -> Any:
    """A shipped object by name, a user's by `module:name`; a Python object that is not text is returned as it is.

    Modules are found as a script in the current working directory would find them. `name` may be dotted (`module:Class.method`).
    `kind` says what is being loaded ("reward", "environment") and opens every error message.

    Raises `ExtensionError` for an unknown name, a module that is missing or raises, and a name that the module lacks.
    """
    if not isinstance(reference, str):
        return reference
    if reference in shipped:
        return shipped[reference]
    module_name, path = split_reference(reference, shipped=shipped, kind=kind)
    found: Any = _import(module_name, f"{kind} {reference!r}")
    for part in path.split("."):
        if not hasattr(found, part):
            owner = f"module {module_name} ({getattr(found, '__file__', None)})" if isinstance(found, ModuleType) else repr(found)
            raise lacks(f"{kind} {reference!r}", owner, part, vars(found))
        found = getattr(found, part)
    return found


def split_reference(reference: str, *, shipped: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """Module and dotted name of `module:name`. Raises `ExtensionError` if it is not written like that; `shipped` serves the message."""
    module_name, colon, path = reference.partition(":")
    if not colon:
        known = ", ".join(sorted(shipped)) or "none"
        raise ExtensionError(
            f"{kind} {reference!r} is not shipped with Verst{_nearest(reference, shipped)} (shipped: {known}). "
            f"For your own write `module:name`, for example `my_{kind.replace(' ', '_')}s:{reference}`"
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ExtensionError(
            f"{kind} {reference!r} is not of the form `module:name`: one colon, and on both sides Python names, with dots between them "
            "where needed, such as `package.module:Class.method` (no path, no .py)"
        )
    return module_name, path


def lacks(what: str, owner: str, name: str, names: Iterable[str]) -> ExtensionError:
    """What to raise where `owner`, which has `names`, lacks the one that the reference `what` gives."""
    return ExtensionError(f"{what}: {owner} has no {name!r}{_nearest(name, names)}: define it there, or name another")


def no_module(what: str, name: str) -> ExtensionError:
    """What to raise where no module is found of the name that the reference `what` gives."""
    return ExtensionError(
        f"{what}: no module {name!r} in {os.getcwd()} or among the installed packages: start Verst in its directory, or add that to "
        "PYTHONPATH"
    )


def no_import(what: str, name: str, error: BaseException) -> ExtensionError:
    """What to raise where the module that the reference `what` gives raises `error`."""
    return ExtensionError(f"{what}: module {name} could not be imported: {origin(error)}: mend the module")


def check_callable(function: Any, kind: str, parameters: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
    """Checks that `function(*parameters, **options)` fits its signature; `parameters` are the names the error shows, in the order of the
    call: where a parameter has the name of another one, it would be given the wrong value.

    Raises `ExtensionError` with the expected call, the actual signature and where it is defined. A callable without a readable signature
    (some builtins) is accepted.
    """
    if not callable(function):
        raise ExtensionError(
            f"{kind} is {function!r} of type {type(function).__name__}, which cannot be called: give a function or a class"
        )
    options = options or {}
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(*parameters, **options)
        _check_order(signature, parameters)
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        call = ", ".join([*parameters, *(f"{key}={value!r}" for key, value in options.items())])
        hint = _nearest_option(signature, options)
        where = f"{kind} {name}{signature} in {_defined_at(function)}"
        remove = " (reward.options=null removes those of the file)" if kind == "reward" and options else ""
        raise ExtensionError(
            f"{where} cannot be called as {name}({call}): {error}{hint}. Change its parameters, or the options that are given{remove}"
        ) from error


def made(found: Any, kind: str, parameters: Sequence[str], options: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with `parameters`: a class is made once, with the options; a function gets them in each call.

    Raises `ExtensionError` with the expected signature. What a class raises as it is made passes.
    """
    if not inspect.isclass(found):
        check_callable(found, kind, parameters, options)
        return partial(found, **options)
    check_callable(found, kind, (), options)
    instance: Any = found(**options)
    check_callable(instance, kind, parameters)
    return instance


def is_async(function: Any) -> bool:
    """Whether it is an `async def`, or an object whose `__call__` is."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def check_class(found: Any, kind: str, protocol: type, options: Mapping[str, Any] | None = None) -> None:
    """Checks that `found(**options)` can be called and, if it is a class, that it has the methods of `protocol`.

    Methods must take the protocol's positional arguments and be `async` where the protocol's are. A factory function is only checked for
    its call: what it returns is known when it runs. Raises `ExtensionError` showing the expected signature.
    """
    if not callable(found) or (not inspect.isclass(found) and isinstance(found, protocol)):
        raise ExtensionError(f"{kind} is {found!r}, an object of type {type(found).__name__}: give the class or a function that makes one")
    if not inspect.isclass(found):
        try:
            check_callable(found, kind, (), options)
        except ExtensionError as error:
            shapes = ", ".join(_shape(name, expected) for name, expected in methods(protocol))
            raise ExtensionError(f"{error}. Expected: a class with {shapes}, or a function that makes an object of one") from error
        return
    check_callable(found, kind, (), options)
    for name, expected in methods(protocol):
        _check_method(found, kind, name, expected)


def guarded(call: Callable[[], T], what: str, failure: type[VerstError]) -> T:
    """What a piece of user code returns. Raises `failure` with what it raised, and where; `what` names it."""
    try:
        return call()
    except VerstError:
        raise
    except Exception as error:
        raise failure(f"{what} raised {origin(error)}: mend the code that gives it") from error


def described(value: object) -> str:
    """A value of user code for a message: how it begins, and its type. It may be one whose `repr` raises."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - it is user code
        text = f"a value whose repr raises {type(error).__name__}"
    return f"{escaped(text):.80} of type {type(value).__name__}"


def escaped(text: str) -> str:
    """The text, with halves of surrogate pairs as escapes: no terminal and no file would take them."""
    return text.encode(errors="backslashreplace").decode()


def origin(error: BaseException) -> str:
    """One line about an exception: its type, message, and the line of code it came from."""
    text = escaped("".join(traceback.format_exception_only(error)).strip())
    if isinstance(error, SyntaxError):  # its own report already shows file and line
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else text


def _import(name: str, what: str) -> ModuleType:
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)  # stays: the module may import its neighbours later
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise no_module(what, error.name) from error
        raise ExtensionError(f"{what}: module {name} could not be imported: {origin(error)}: install or mend what it imports") from error
    except Exception as error:
        raise no_import(what, name, error) from error


def methods(protocol: type) -> list[tuple[str, Callable[..., Any]]]:
    """What a class must have, by name."""
    public = ((name, value) for name, value in vars(protocol).items() if inspect.isfunction(value))
    return [(name, value) for name, value in public if not name.startswith("_") or name == "__call__"]


def _shape(name: str, expected: Callable[..., Any]) -> str:
    return f"{'async ' if inspect.iscoroutinefunction(expected) else ''}def {name}{inspect.signature(expected)}"


def _check_method(found: type, kind: str, name: str, expected: Callable[..., Any]) -> None:
    shape = _shape(name, expected)
    where = f"{kind} {found.__qualname__} in {_defined_at(found)}"
    method = getattr(found, name, None)
    if not callable(method):
        raise ExtensionError(f"{where} has no method {name!r}{_nearest(name, dir(found))}; expected: {shape}")
    if inspect.iscoroutinefunction(expected) and not inspect.iscoroutinefunction(method):
        raise ExtensionError(f"{where}: {name!r} must be an `async def`; expected: {shape}")
    parameters = [p.name for p in inspect.signature(expected).parameters.values() if p.kind in _OWN]
    try:
        inspect.signature(method).bind(*parameters)
        _check_order(inspect.signature(method), parameters)
    except TypeError as error:
        raise ExtensionError(f"{where}: {name}{inspect.signature(method)} does not fit: {error}; expected: {shape}") from error


def _check_order(signature: inspect.Signature, parameters: Sequence[str]) -> None:
    """Raises `TypeError` if a parameter has the name of another one of those that are given by position."""
    for own, given in signature.bind_partial(*parameters).arguments.items():
        if own != given and own in parameters and given in parameters:
            raise TypeError(f"its parameter {own!r} would be given {given}: put them in this order")


def _defined_at(found: Any) -> str:
    target = inspect.unwrap(found)
    if not (inspect.isroutine(target) or inspect.isclass(target)):  # an object with __call__
        target = type(target)
    try:
        return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}"
    except (TypeError, OSError):  # builtins, code typed at a prompt, what stands in for a class
        return str(getattr(target, "__module__", "an unknown place"))


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f"; nearest: {', '.join(close)}" if close else ""


def _nearest_option(signature: inspect.Signature, options: Mapping[str, Any]) -> str:
    unknown = [name for name in options if name not in signature.parameters]
    return _nearest(unknown[0], signature.parameters) if unknown else ""
