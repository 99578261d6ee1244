"""Weights at rest: nothing may change what a trainer rank trains between two steps, and copies that ranks hold have the same bits.

A rank hashes its tensors after the last update of a step and again before the next step reads them. Both passes are bounded by memory
bandwidth: every step has them where they take less than `SHARE` of its time, as with any model of use, else as many as that allows. Ranks
then exchange a few numbers each: whether their tensors are as they were, and one hash of all that others may hold too. Names are exchanged
only after something was found.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from verst.errors import CorruptWeights
from verst.training.distributed import all_ranks, local_part
from verst.training.model import named
from verst.weights.checksum import start_checksums

SHARE = 0.01
"""Of the time of a step that hashing may take, on average over steps."""
_MOST_STEPS = 20
"""From one that is looked at to the next."""
_KINDS = 3
"""Sets of tensors that a rank compares with others, at most: those that all of a data-parallel group hold, those that tensor-parallel ranks
hold too, and experts."""

_REMEDY = (
    "Nothing was trained with it. A device or its memory may be damaged, or some code wrote where it must not: "
    "docs/operations.md says how to find out"
)


@dataclass(frozen=True)
class Held:
    """What one rank holds. `tensors` by name, no memory twice.

    `copies`: for each name of which other ranks may have a copy: a kind (of `_KINDS`), whose tensors are held by the same ranks, and what
    it is in the whole model: equal on all ranks that hold it.
    """

    tensors: Mapping[str, torch.Tensor]
    copies: Mapping[str, tuple[int, str]] = field(default_factory=dict)


class AtRest:
    """Keeps the hashes of one rank from an update to the next step. `held` is asked each time."""

    def __init__(self, rank: int, held: Callable[[], Held]) -> None:
        self._rank = rank
        self._held = held
        self._kept: Callable[[], dict[str, str]] | None = None
        self._since = ""
        self._every = 1  # steps; the same on all ranks
        self._passed_over = 0
        self._spent_s = 0.0  # on the hashes that are kept
        self._asked = -math.inf  # when `require` was called last

    def keep(self, since: str, *, always: bool = False) -> None:
        """From here on nothing may change them. A GPU hashes while the caller goes on. `since` is for the message.

        `always`: also if hashing each step would take more than `SHARE` of the time.
        """
        self._passed_over += 1
        if self._passed_over < self._every and not always:
            self._kept = None
            return
        began, self._passed_over = time.perf_counter(), 0
        self._since, self._kept = since, _hashing(self._held().tensors)
        self._spent_s = time.perf_counter() - began

    def forget(self) -> None:
        """They are about to be changed."""
        self._kept = None

    def require_own(self, before: str) -> None:
        """Raises `CorruptWeights` if this rank's are not those that were kept. No collective."""
        if self._kept is None:
            return
        began = time.perf_counter()
        changed = self._changed(_hashing(self._held().tensors)())
        if changed:
            raise _corrupt([self._rest_line(self._rank, changed, before)], [self._rank])
        self._spent_s += time.perf_counter() - began

    def require(self, before: str) -> None:
        """Raises `CorruptWeights`, on all ranks, if some rank's are not those that it kept, or copies differ. A collective."""
        began, since_s = time.perf_counter(), time.perf_counter() - self._asked
        self._asked = began
        held = Held({}) if self._kept is None else self._held()
        found = _hashing(held.tensors)()
        changed = self._changed(found)
        copies = _by_kind(held.copies, found)
        digests = [number for kind in range(_KINDS) for number in _digests(copies.get(kind, {}))]
        rows = _gathered([self._wanted_every(began, since_s), int(bool(changed)), *digests])
        self._every = int(rows[:, 0].max())
        differing = [kind for kind in range(_KINDS) if _differ(rows[:, 2 + 2 * kind : 4 + 2 * kind])]
        if not rows[:, 1].any() and not differing:
            return
        told = all_ranks((changed, {place: checksum for kind in differing for place, checksum in copies.get(kind, {}).items()}))
        at_rest = {rank: names for rank, (names, _) in enumerate(told) if names}
        raise self._diagnosed(at_rest, {rank: held for rank, (_, held) in enumerate(told)}, before)

    def _wanted_every(self, began: float, step_s: float) -> int:
        """Every how many steps this rank would hash. `began`: when it began to look; `step_s`: since it looked at the step before."""
        if self._kept is None:
            return self._every
        spent_s = self._spent_s + time.perf_counter() - began
        return min(max(1, math.ceil(spent_s / (SHARE * step_s))), _MOST_STEPS)

    def _changed(self, found: Mapping[str, str]) -> list[str]:
        kept = self._kept() if self._kept is not None else found
        return [name for name, checksum in found.items() if kept.get(name) != checksum]

    def _diagnosed(self, at_rest: Mapping[int, list[str]], copies: Mapping[int, Mapping[str, str]], before: str) -> CorruptWeights:
        """Which ranks, which tensors. A rank whose own hashes changed is the one to blame for its copies."""
        lines = [self._rest_line(rank, names, before) for rank, names in at_rest.items()]
        blamed = set(at_rest)
        for (culprits, right), names in _disagreements({r: c for r, c in copies.items() if r not in at_rest}).items():
            if right:
                lines.append(f"{_ranks(culprits)}: {named(names)} before {before} differs from the copies of {_ranks(right)}")
            else:
                lines.append(f"one of {_ranks(culprits)}: their copies of {named(names)} differ before {before}")
            blamed.update(culprits)
        return _corrupt(lines, sorted(blamed))

    def _rest_line(self, rank: int, names: list[str], before: str) -> str:
        return f"trainer rank {rank}: {named(names)} changed between {self._since} and {before}, while nothing may change it"


def unique(*sets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's parts of all of them by name, without what lies in memory that an earlier set has."""
    found: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for tensors in sets:
        parts = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        found |= {name: part for name, part in parts.items() if part.untyped_storage()._cdata not in known}
        known |= {part.untyped_storage()._cdata for part in parts.values()}
    return found


def _hashing(tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, str]]:
    names, hashing = list(tensors), start_checksums(list(tensors.values()))
    return lambda: dict(zip(names, hashing(), strict=True))


def _by_kind(copies: Mapping[str, tuple[int, str]], found: Mapping[str, str]) -> dict[int, dict[str, str]]:
    kinds: dict[int, dict[str, str]] = {}
    for name, (kind, place) in copies.items():
        kinds.setdefault(kind, {})[place] = found[name]
    return kinds


def _digests(copies: Mapping[str, str]) -> tuple[int, int]:
    """One number for which tensors these are (0: none), one for their bits."""
    if not copies:
        return 0, 0
    ordered = sorted(copies.items())
    return _number(place for place, _ in ordered) or 1, _number(checksum for _, checksum in ordered)


def _number(texts: Iterable[str]) -> int:
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _differ(rows: np.ndarray) -> bool:
    """[ranks, 2], which tensors and their bits: whether ranks that hold the same tensors hold other bits."""
    bits: dict[int, set[int]] = {}
    for which, digest in rows.tolist():
        bits.setdefault(which, set()).add(digest)
    return any(len(found) > 1 for found in bits.values())


def _gathered(numbers: list[int]) -> np.ndarray:
    """[ranks, numbers] int64. A collective, on the CPU."""
    own = torch.tensor(numbers, dtype=torch.int64)
    if not dist.is_initialized():
        return own[None].numpy()
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).numpy()


def _disagreements(copies: Mapping[int, Mapping[str, str]]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]]:
    """Tensors by who holds other bits than most and who holds those of most; nobody, where no bits are those of most."""
    holders: dict[str, dict[int, str]] = {}
    for rank, held in copies.items():
        for place, checksum in held.items():
            holders.setdefault(place, {})[rank] = checksum
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for place, checksums in holders.items():
        (most, count), *rest = Counter(checksums.values()).most_common()
        if not rest:
            continue
        right = [rank for rank, checksum in checksums.items() if checksum == most] if count > len(checksums) / 2 else []
        found.setdefault((tuple(sorted(checksums.keys() - right)), tuple(right)), []).append(place)
    return found


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [*map(str, ranks)]
    return f"trainer rank {numbers[0]}" if len(numbers) == 1 else f"trainer ranks {named(numbers)}"


def _corrupt(lines: list[str], ranks: list[int]) -> CorruptWeights:
    error = CorruptWeights("; ".join(lines) + f". {_REMEDY}")
    error.ranks = tuple(ranks)
    return error
