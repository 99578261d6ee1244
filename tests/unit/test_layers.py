"""The shape of the code base, read from its syntax trees: layers, heavy imports, cycles, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "verst"
FILES = sorted(PACKAGE.rglob("*.py"))

# design: a module imports only from lower layers; packages of one layer know each other through protocols and types
LAYERS = {
    **{"errors": 0, "fields": 0.1, "types": 0.2, "secrets": 0.25},
    **dict.fromkeys(["extend", "protocols", "observe"], 0.5),
    **dict.fromkeys(["isolated", "slime_api", "model_spec", "on_paper"], 0.7),
    "config": 1,
    **dict.fromkeys(["data", "rewards", "filters", "hooks", "algorithms", "routing", "precision", "journal"], 2),
    "exact": 2,
    "weights": 2.5,  # files, checksums and pushes: what engines and backends have in common
    **dict.fromkeys(["rollout", "training"], 3),
    "runtime": 4,
    **dict.fromkeys(["recipes", "dashboard", "doctor"], 5),
    "cli": 6,
}
OUTSIDE = {"testing", "model_contract", "fault_injection", "__init__"}  # fakes and faults for every layer; the public names, loaded lazily

# where a system may be imported at all, and where torch may not be imported at module level
ONLY_IN = {"ray": ("runtime/",), "sglang": ("rollout/sglang",), "megatron": ("training/megatron/",)}
NO_TORCH = (
    *("types.py", "errors.py", "fields.py", "extend.py", "on_paper.py", "protocols.py", "doctor/"),
    *("observe/", "config/", "data/", "rewards/", "isolated/", "filters/", "hooks.py", "algorithms/", "journal/", "runtime/", "cli/"),
)

FILE_LINES = 400
FUNCTION_LINES = 60
# where code that is not ours, or a thread of ours, ends: there, and only there, any failure is attributed to what crossed the boundary
BROAD_EXCEPT = {
    "extend.py",
    "observe/tracking.py",
    "runtime/mailbox.py",
    "runtime/scaler.py",
    "isolated/served.py",
    "rollout/agent.py",
    "rollout/boundary.py",
    "rollout/hf/worker.py",
    "rollout/sglang/plugin.py",
    "runtime/wait.py",
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path, *, runtime_only: bool = True, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """Imported modules with their lines; `if TYPE_CHECKING` blocks do not count as run time."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and runtime_only:
                continue
            if top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names if is_package)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file: Path):
    own = name_of(file).split("/")[0].removesuffix(".py")
    if own in OUTSIDE:
        return
    assert own in LAYERS, f"{own} has no layer: add it to LAYERS and to the design"
    for module, line in imports(file):
        if not module.startswith("verst."):
            continue
        other = package_of(module)
        assert other == own or LAYERS.get(other, 9) < LAYERS[own], f"{name_of(file)}:{line} (layer {LAYERS[own]}) imports {module}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_heavy_packages_stay_where_they_belong(file: Path):
    name = name_of(file)
    for module, line in imports(file):
        root = module.split(".")[0]
        allowed = ONLY_IN.get(root)
        assert allowed is None or name.startswith(allowed), f"{name}:{line} imports {module}, which belongs in {allowed}"
    if name.startswith(NO_TORCH):
        for module, line in imports(file, top_only=True):
            assert module.split(".")[0] not in ("torch", "transformers"), f"{name}:{line} imports {module} when it is loaded"


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    known = {f"verst.{name_of(f).removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): f for f in FILES}
    for module, file in known.items():
        graph[module] = {m for m, _ in imports(file, top_only=True) if m in known and m != module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in graph[module]:
            visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_sizes_stay_within_budget(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= FILE_LINES, f"{name_of(file)} is longer than {FILE_LINES} lines: two ideas share a room"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{name_of(file)}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_broad_except_only_at_the_boundaries(file: Path):
    if name_of(file) in BROAD_EXCEPT:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # and lets the error pass
            assert not broad or cleans_up, f"{name_of(file)}:{node.lineno} catches everything"
