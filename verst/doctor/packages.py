"""Installed packages against the version sets of `verst/matrix.toml`. Reads their metadata; imports none of them."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from verst.doctor.findings import Finding

_MATRIX = Path(__file__).parent.with_name("matrix.toml")
_PURPOSE = {"core": "", "sglang": "rollout.engine sglang", "megatron": "train.backend megatron"}


@dataclass(frozen=True, slots=True)
class VersionSet:
    """One entry of `verst/matrix.toml`. `packages` and `install` are by what needs them: core, sglang, megatron."""

    name: str
    gpu: bool
    python: str
    passed: str
    install: Mapping[str, str]
    packages: Mapping[str, Mapping[str, str]]


def version_sets() -> list[VersionSet]:
    """The tested matrix."""
    sets = tomllib.loads(_MATRIX.read_text(encoding="utf-8"))["set"]
    return [
        VersionSet(s["name"], s["gpu"], s["python"], s["passed"], s["install"], {group: s[group] for group in _PURPOSE if group in s})
        for s in sets
    ]


def nearest_set(sets: Sequence[VersionSet]) -> VersionSet:
    """The set with most of its versions found here."""
    return max(sets, key=lambda s: sum(installed(name) == tested for group in s.packages.values() for name, tested in group.items()))


def installed(package: str) -> str | None:
    try:
        return version(package).split("+")[0]  # a local label such as +cu130 is no other version
    except PackageNotFoundError:
        return None


def python_finding(nearest: VersionSet) -> Finding:
    found = platform.python_version()
    same = found.startswith(f"{nearest.python}.")
    return Finding("python", found, nearest.python, "ok" if same else "other")


def package_findings(nearest: VersionSet) -> Iterator[Finding]:
    for group, packages in nearest.packages.items():
        used = group == "core" or installed(group if group == "sglang" else "megatron-core") is not None
        for package, tested in packages.items():
            found = installed(package) if used else None  # PyTorch brings a triton of its own, which matters to nobody else
            if found is not None and tested in (found, ""):
                yield Finding(package, found, tested, "ok")
            elif found is not None:
                yield Finding(package, found, tested, "other", f"not tested with {found}; the tested one: pip install {package}=={tested}")
            elif group == "core":
                yield Finding(package, "-", tested, "LACKING", nearest.install[group])
            else:
                yield Finding(package, "-", tested, "absent", f"only for {_PURPOSE[group]}: {nearest.install[group]}")
