"""What a checkpoint's headers say about its tensors, and whether a published version fits it. Reads no weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from verst.errors import WeightMismatch
from verst.types import Manifest
from verst.weights.names import parts

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def headers(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a directory's safetensors files, by name. Empty if it has none."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(length))
        found |= {n: (tuple(e["shape"]), _DTYPES.get(e["dtype"], e["dtype"])) for n, e in entries.items() if n != "__metadata__"}
    return found


def check_fits(manifest: Manifest, known: dict[str, tuple[tuple[int, ...], str]], dtype: str, *, tied: bool) -> None:
    """Raises `WeightMismatch` naming the tensors of a version that the engine's model lacks, that it would miss, or that differ in form.

    `known` are the checkpoint's headers, `dtype` is the engine's; a tensor that the checkpoint keeps in another type may come in that.
    """
    if not known:
        return
    given: set[str] = set()
    unknown: list[str] = []
    for entry in manifest.entries:
        for name, _, shape in parts(entry.name, entry.shape):
            given.add(name)
            if name not in known:
                unknown += [] if tied and name == "lm_head.weight" else [entry.name]
                continue
            kept_shape, kept_dtype = known[name]
            if shape != kept_shape or entry.dtype not in (dtype, kept_dtype):
                raise WeightMismatch(
                    f"{entry.name!r} is published as {entry.dtype} {entry.shape}, "
                    f"but the engine's parameter is {dtype} {kept_shape} ({name})"
                )
    if unknown:
        raise WeightMismatch(f"version {manifest.version} has {named(unknown)}, which the engine's model does not have")
    if missing := known.keys() - given:
        raise WeightMismatch(f"version {manifest.version} lacks {named(missing)}: the engine would keep older weights there")


def named(names: Iterable[str]) -> str:
    """Up to five names, sorted, and how many more there are."""
    ordered = sorted(set(names))
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(map(repr, ordered[:5])) + rest
