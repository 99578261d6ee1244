"""User code as its source has it, for checks that import nothing.

A stand-in has the name, signature, methods and place of a function or class, and does nothing. So what a run asks of user code as it
starts can be asked of a stand-in before. Of what the source does not settle there is none, since nothing may be refused that would run:
names that are imported, assigned, decorated or bound twice, classes with bases of elsewhere, modules that write into their own names.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from verst import extend, protocols

_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
_OWN_SCOPE = *_FUNCTIONS, ast.ClassDef, ast.Lambda
_DYNAMIC_NAMES = {"globals", "locals", "vars", "exec", "eval", "setattr", "__path__"}
_DYNAMIC_ATTRIBUTES = {"modules", "__dict__", "__path__", "f_globals", "f_locals"}
_KNOWN_DECORATORS = {"staticmethod": staticmethod, "classmethod": classmethod, "property": property}
_MAKING = {"__init__", "__call__", "__signature__"}
"""What decides how a class is called, beside the methods that are asked for."""
_UNREAD = {"__new__", "__init_subclass__"}
"""A class with one of these may be anything."""


def stand_in(reference: str, kind: str, protocol: type) -> Any:
    """What `module:name` names, as a function or class that does nothing; None if its source does not settle what it is.

    Of a class the methods of `protocol` are sure to be as in the source; `kind` opens every message, as in `verst.extend.load`.

    Raises `ExtensionError` if the module is not there or cannot be parsed, or lacks the name.
    """
    module_name, path = extend.split_reference(reference, shipped={}, kind=kind)
    what = f"{kind} {reference!r}"
    file, locations = _find(module_name, what)
    module = None if file is None else _read(file, module_name, what)
    if module is None or module.dynamic:
        return None
    name, _, within = path.partition(".")
    if name not in module.bound and PathFinder.find_spec(name, locations) is None:
        raise extend.lacks(what, f"module {module_name} ({file})", name, module.bound)
    return None if within else module.stand_in(name, {method for method, _ in extend.methods(protocol)})


@dataclass(frozen=True)
class _Module:
    """One that was parsed."""

    file: Path
    tree: ast.Module

    @cached_property
    def bound(self) -> dict[str, list[ast.AST]]:
        """Each name of the module, with all that binds it, or changes what it names."""
        found = _bindings(self.tree.body)
        for node in ast.walk(self.tree):
            for name in node.names if isinstance(node, ast.Global) else [_changed(node)]:
                if name is not None:
                    found[name].append(node)
        return found

    @cached_property
    def dynamic(self) -> bool:
        """Whether it may have other names than those that are seen."""
        return "__getattr__" in self.bound or any(map(_is_dynamic, ast.walk(self.tree)))

    @cached_property
    def _protocols(self) -> dict[str, Any]:
        """What it imports of `verst.protocols`, by the names that it has here."""
        imports = (node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) and node.module == protocols.__name__)
        return {alias.asname or alias.name: getattr(protocols, alias.name, None) for node in imports for alias in node.names}

    def stand_in(self, name: str, methods: Set[str]) -> Any:
        node = self._only(name)
        if isinstance(node, _FUNCTIONS) and not node.decorator_list:
            return _function(node, self.file)
        return self._class(node, methods) if isinstance(node, ast.ClassDef) else None

    def _only(self, name: str) -> ast.AST | None:
        """The one place that binds a name."""
        nodes = self.bound.get(name, [])
        return nodes[0] if len(nodes) == 1 else None

    def _class(self, node: ast.ClassDef, methods: Set[str]) -> type | None:
        bases = tuple(self._base(base, node, methods) for base in node.bases)
        members = _members(node, self.file, methods | _MAKING)
        if node.decorator_list or node.keywords or members is None or None in bases:
            return None
        place = f"{self.file}:{node.lineno}"  # where messages show a module: no module has been imported
        try:
            return types.new_class(node.name, bases, exec_body=lambda names: names.update(members, __module__=place))
        except TypeError:  # bases that do not go together
            return None

    def _base(self, base: ast.expr, of: ast.ClassDef, methods: Set[str]) -> Any:
        name = base.id if isinstance(base, ast.Name) else ""
        node = self._only(name)
        if isinstance(node, ast.ClassDef) and node.lineno < of.lineno:
            return self._class(node, methods)
        if isinstance(node, ast.alias):
            return self._protocols.get(name)
        return object if name == "object" and name not in self.bound else None


def _find(module: str, what: str) -> tuple[Path | None, Sequence[str]]:
    """The source of a module, and where its submodules are. No source: it is not Python's, or only an import could find it.

    Raises `ExtensionError` if its package surely lacks it.
    """
    importlib.invalidate_caches()
    spec, locations, seen = None, [os.getcwd(), *sys.path], list[str]()
    for part in module.split("."):
        parent, spec = spec, PathFinder.find_spec(part, locations)
        if spec is None:
            if parent is not None and module not in sys.modules and _is_settled(parent, ".".join(seen), what):
                raise extend.no_module(what, ".".join([*seen, part]))
            return None, []
        seen.append(part)
        locations = list(spec.submodule_search_locations or ())
    return _source(spec), locations


def _source(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _is_settled(package: ModuleSpec, name: str, what: str) -> bool:
    """Whether a package has no other modules than those in its directories."""
    file = _source(package)
    if file is None:
        return package.origin is None  # it has directories and no code
    module = _read(file, name, what)
    return module is not None and not module.dynamic


def _read(file: Path, name: str, what: str) -> _Module | None:
    """The module `name`, parsed; None if its file cannot be read. Raises `ExtensionError` for mistakes of syntax."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler, which come when it is imported
            source = file.read_bytes()
            compile(source, str(file), "exec", dont_inherit=True)  # finds more mistakes than the parser
            return _Module(file, ast.parse(source))
    except (SyntaxError, ValueError) as error:
        raise extend.no_import(what, name, error) from error
    except OSError:
        return None


# ---- what a source binds


def _bindings(body: Iterable[ast.AST]) -> defaultdict[str, list[ast.AST]]:
    """The names that statements of one scope bind, each with all the nodes that do."""
    found: defaultdict[str, list[ast.AST]] = defaultdict(list)
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        if (name := _bound_by(node)) is not None:
            found[name].append(node)
        if not isinstance(node, _OWN_SCOPE):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def _bound_by(node: ast.AST) -> str | None:
    if isinstance(node, ast.alias):
        return node.asname or node.name.partition(".")[0]
    if isinstance(node, ast.Name):
        return None if isinstance(node.ctx, ast.Load) else node.id
    if isinstance(node, ast.MatchMapping):
        return node.rest
    return getattr(node, "name", None)  # of a function, a class, an exception that is caught, a pattern


def _changed(node: ast.AST) -> str | None:
    """The name of the object, an attribute of which is set here."""
    if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
        return None
    target: ast.expr = node
    while isinstance(target, ast.Attribute):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None


def _is_dynamic(node: ast.AST) -> bool:
    if isinstance(node, ast.alias):
        return node.name in {"*", "modules"}
    return (isinstance(node, ast.Name) and node.id in _DYNAMIC_NAMES) or (
        isinstance(node, ast.Attribute) and node.attr in _DYNAMIC_ATTRIBUTES
    )


# ---- what stands in


def _members(node: ast.ClassDef, file: Path, needed: Set[str]) -> dict[str, Any] | None:
    """The methods of a class that are plain; None if one of those `needed` is not, or the class may make anything."""
    bound = _bindings(node.body)
    plain = {name: nodes[0] for name, nodes in bound.items() if len(nodes) == 1}
    members = {name: made for name, method in plain.items() if (made := _method(method, node.name, file)) is not None}
    return None if _UNREAD & bound.keys() or (needed & bound.keys()) - members.keys() else members


def _method(node: ast.AST, owner: str, file: Path) -> Any:
    if not isinstance(node, _FUNCTIONS):
        return None
    names = [decorator.id if isinstance(decorator, ast.Name) else "" for decorator in node.decorator_list]
    if not _KNOWN_DECORATORS.keys() >= set(names):
        return None
    made: Any = _function(node, file)
    made.__qualname__ = f"{owner}.{node.name}"
    for name in reversed(names):
        made = _KNOWN_DECORATORS[name](made)
    return made


class _Written(str):
    """A default as it is written: in a signature it shows as that."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, file: Path) -> Any:
    """A function with the name, place and parameters of `node`, without annotations and body."""
    empty, arguments = copy.copy(node), copy.copy(node.args)
    empty.args, empty.body, empty.decorator_list, empty.returns = arguments, [ast.Pass()], [], None
    arguments.defaults = [_written(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and _written(default) for default in arguments.kw_defaults]
    for name in ("posonlyargs", "args", "kwonlyargs"):
        setattr(arguments, name, [ast.arg(a.arg) for a in getattr(arguments, name)])
    for name in ("vararg", "kwarg"):
        setattr(arguments, name, (one := getattr(arguments, name)) and ast.arg(one.arg))
    names: dict[str, Any] = {"written": _Written}
    exec(compile(ast.fix_missing_locations(ast.Module([empty], [])), str(file), "exec", dont_inherit=True), names)
    return names[node.name]


def _written(default: ast.expr) -> ast.expr:
    return ast.Call(ast.Name("written", ast.Load()), [ast.Constant(ast.unparse(default))], [])
