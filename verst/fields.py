"""Values of a user's own on their way from a rollout or a reward to advantages and loss. Each says by its class what it belongs to.

Environments and agents give them in their `info`, rewards in a `Score`. They are checked there, once; the journal keeps them with their
trajectory, and a step that is trained again has the same.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verst.errors import ExtensionError, VerstError

if TYPE_CHECKING:
    from verst.types import Sample

MAX_FIELDS = 32
"""Of one trajectory."""
MAX_OPAQUE_BYTES = 64 * 1024

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False, init=False)
class PerToken:
    """One number for each generated token, in order: those where `loss_mask_T` is True. Finite, float32.

    Of a trajectory with branches: those of its own conversation, then of each branch (`Trajectory.sequences`).
    """

    values: NDArray[np.float32]

    def __init__(self, values: ArrayLike) -> None:
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, which is refused with the field's name
            object.__setattr__(self, "values", np.asarray(values, np.float32))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerToken) and np.array_equal(self.values, other.values)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True, slots=True)
class PerSample:
    """One number for the trajectory. Finite; float32 in the loss."""

    value: float


@dataclass(frozen=True, slots=True)
class Opaque:
    """A JSON value of at most 64 KiB, which nothing but the user's own functions reads. As JSON holds it: tuples come back as lists."""

    value: Any


Field = PerToken | PerSample | Opaque


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward may return in place of its number: the number, with fields beside it."""

    reward: Any
    fields: Mapping[str, Field] = field(default_factory=dict)


def apart(info: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of an `info` is plain, and what of it are fields."""
    plain = {name: value for name, value in info.items() if not isinstance(value, Field)}
    return plain, {name: value for name, value in info.items() if isinstance(value, Field)}


def checked(given: Any, where: str, failure: type[VerstError], *, tokens: int | None = None) -> dict[str, Field]:
    """The fields, if each can travel. `tokens`: values that a `PerToken` must have. Raises `failure`, which begins with `where`."""
    if not isinstance(given, Mapping):
        raise failure(f"{where} gives fields {given!r:.80} of type {type(given).__name__}, not a mapping of names to fields")
    if len(given) > MAX_FIELDS:
        raise failure(f"{where} gives {len(given)} fields: a trajectory may have {MAX_FIELDS}")
    for name, value in given.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise failure(f"{where} names a field {name!r}: give it a name of letters, digits and underscores")
        fault = _fault(value)
        if fault is not None:
            raise failure(f"{where}: field {name!r} {fault}")
        if tokens is not None and isinstance(value, PerToken):
            require_length(name, value, tokens, where, failure)
    return {name: _canonical(value) for name, value in given.items()}


def _canonical(value: Field) -> Field:
    """A copy, as it comes out of the journal: whoever gave it may go on to use what it is made of."""
    if isinstance(value, PerSample):
        return PerSample(float(value.value))
    return Opaque(json.loads(json.dumps(value.value))) if isinstance(value, Opaque) else PerToken(value.values.copy())


def require_length(name: str, given: PerToken, tokens: int, where: str, failure: type[VerstError], of: str = "generated token") -> None:
    """Raises `failure` unless there is a value for each of so many tokens."""
    if len(given.values) != tokens:
        raise failure(f"{where}: field {name!r} is PerToken with {len(given.values)} values, not {tokens}: one for each {of}")


def _fault(value: Any) -> str | None:
    if isinstance(value, PerToken):
        if value.values.ndim != 1:
            return f"is PerToken with an array of shape {list(value.values.shape)}, not a list of numbers"
        broken = np.flatnonzero(~np.isfinite(value.values))
        return f"is PerToken with {value.values[broken[0]]} at place {broken[0]}: give finite numbers of float32" if broken.size else None
    if isinstance(value, PerSample):
        known = isinstance(value.value, int | float | np.floating | np.integer)
        if not known or not abs(value.value) <= _LARGEST:  # which no NaN is
            return f"is PerSample with {value.value!r:.80}: give a finite number of float32"
        return None
    if isinstance(value, Opaque):
        return _opaque_fault(value.value)
    return f"is {value!r:.80} of type {type(value).__name__}: declare it as PerToken, PerSample or Opaque"


def _opaque_fault(value: Any) -> str | None:
    try:
        size = len(json.dumps(value, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        return f"is Opaque with a value that is not JSON: {error}"
    return f"is Opaque with {size} bytes of JSON: at most {MAX_OPAQUE_BYTES} can travel" if size > MAX_OPAQUE_BYTES else None


def kinds_of(samples: Iterable[Sample]) -> dict[str, type[Field]]:
    """The class of each field that any of the samples has, sorted by name.

    Raises `ExtensionError` if samples have different kinds under one name, or a `PerToken` of another length.
    """
    seen: dict[str, tuple[type[Field], str]] = {}
    for sample in samples:
        for name, value in sample.fields.items():
            kind, first = seen.setdefault(name, (type(value), sample.id))
            if type(value) is not kind:
                raise ExtensionError(
                    f"field {name!r} is {kind.__name__} in sample {first}, {type(value).__name__} in sample {sample.id}: give it one kind"
                )
            if isinstance(value, PerToken):
                require_length(name, value, int(sample.loss_mask_T.sum()), f"sample {sample.id}", ExtensionError)
    return {name: seen[name][0] for name in sorted(seen)}


def by_sequence(fields: Mapping[str, Field], tokens: Sequence[int]) -> list[Mapping[str, Field]]:
    """A trajectory's fields as each of its sequences has them, which have so many loss tokens: `PerToken` are cut, others are of all.

    What is missing or left over in a `PerToken` is so in the last ones: see `kinds_of`.
    """
    if len(tokens) == 1:
        return [fields]
    ends = np.cumsum(tokens)[:-1]
    cut = {name: np.split(value.values, ends) for name, value in fields.items() if isinstance(value, PerToken)}
    return [{**fields, **{name: PerToken(parts[i]) for name, parts in cut.items()}} for i in range(len(tokens))]


# ---- as bytes


def packed(fields: Mapping[str, Field]) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """JSON values, and the numbers of all `PerToken` end to end."""
    about: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PerToken):
            about[name] = ["per_token", len(value.values)]
        elif isinstance(value, PerSample):
            about[name] = ["per_sample", float(value.value)]
        else:
            about[name] = ["opaque", value.value]
    return about, np.concatenate([np.zeros(0, np.float32), *(f.values for f in fields.values() if isinstance(f, PerToken))])


def unpacked(about: Mapping[str, Any], numbers: NDArray[np.float32]) -> dict[str, Field]:
    """The inverse of `packed`, as views of `numbers`."""
    fields: dict[str, Field] = {}
    start = 0
    for name, (kind, value) in about.items():
        if kind == "per_token":
            fields[name] = PerToken(numbers[start : start + value])
            start += value
        else:
            fields[name] = PerSample(value) if kind == "per_sample" else Opaque(value)
    return fields


def plain(value: Field) -> Any:
    """It as a JSON value, for people to read."""
    return value.values.tolist() if isinstance(value, PerToken) else value.value


def to_json(fields: Mapping[str, Field]) -> dict[str, Any]:
    """All of it as JSON values, bit for bit."""
    about, numbers = packed(fields)
    return {"about": about, "numbers": base64.b64encode(numbers.astype("<f4").tobytes()).decode()}


def from_json(packed_fields: Mapping[str, Any]) -> dict[str, Field]:
    """The inverse of `to_json`."""
    numbers = np.frombuffer(base64.b64decode(packed_fields["numbers"]), "<f4").astype(np.float32)
    return unpacked(packed_fields["about"], numbers)
