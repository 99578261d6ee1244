"""Where records lie, by key, in few bytes each: a long run has millions of groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_OFFSET_BITS = 40  # of a packed location, below the segment's number
_SPARE = 1024


class Location(NamedTuple):
    """Where a frame starts."""

    segment: int
    offset: int


class Column:
    """A growing array of whole numbers by key, which counts from 0; 0 where nothing was set."""

    def __init__(self, dtype: Any) -> None:
        self._values_K = np.zeros(0, dtype)
        self.end = 0
        """The first key beyond those that were set."""

    def get(self, key: int) -> int:
        return int(self._values_K[key]) if 0 <= key < self.end else 0

    def set(self, key: int, value: int) -> None:
        self._reach(key + 1)
        self._values_K[key] = value
        self.end = max(self.end, key + 1)

    def get_all(self, keys_N: NDArray[np.int64]) -> NDArray[Any]:
        """The values of many keys from 0 on."""
        self._reach(_end(keys_N))
        return self._values_K[keys_N]

    def set_all(self, keys_N: NDArray[np.int64], values_N: Any) -> None:
        """`values_N`: one for each key, or one for all."""
        self._reach(_end(keys_N))
        self._values_K[keys_N] = values_N
        self.end = max(self.end, _end(keys_N))

    def up_to(self, end: int) -> NDArray[Any]:
        """The values of the keys below `end`."""
        self._reach(end)
        return self._values_K[:end]

    def _reach(self, end: int) -> None:
        if end > len(self._values_K):
            grown_K = np.zeros(end + end // 4 + _SPARE, self._values_K.dtype)
            grown_K[: self.end] = self._values_K[: self.end]
            self._values_K = grown_K


class Places(Mapping[int, Location]):
    """Locations by key, 8 bytes each. Iterates by ascending key."""

    def __init__(self) -> None:
        self._packed = Column(np.int64)

    @property
    def end(self) -> int:
        """The first key beyond those that it holds."""
        return self._packed.end

    def __getitem__(self, key: int) -> Location:
        packed = self._packed.get(key)
        if not packed:  # no frame that is looked for lies at the start of segment 0
            raise KeyError(key)
        return Location(packed >> _OFFSET_BITS, packed & ((1 << _OFFSET_BITS) - 1))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and self._packed.get(key) != 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self.holds_up_to(self.end)))

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.holds_up_to(self.end)).tolist())

    def holds(self, keys_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some keys from 0 on it holds."""
        return self._packed.get_all(keys_N) != 0

    def holds_up_to(self, end: int) -> NDArray[np.bool_]:
        """Which of the keys below `end` it holds."""
        return self._packed.up_to(end) != 0

    def since(self, key: int) -> list[int]:
        """The keys from one on, ascending."""
        return (np.flatnonzero(self._packed.up_to(self.end)[key:]) + key).tolist()

    def count_in(self, segments: Collection[int]) -> int:
        """How many keys lie in some segments."""
        found_N = self._packed.up_to(self.end)
        return int(np.isin(found_N[found_N != 0] >> _OFFSET_BITS, list(segments)).sum())

    def add(self, key: int, where: Location) -> None:
        """Sets the place of a key, from 0 on; it may have had another."""
        self._packed.set(key, where.segment << _OFFSET_BITS | where.offset)

    def add_all(self, keys_N: NDArray[np.int64], segments_N: NDArray[np.int64], offsets_N: NDArray[np.int64]) -> None:
        """Sets the places of many keys; of one that is named twice the last place counts."""
        self._packed.set_all(keys_N, segments_N << _OFFSET_BITS | offsets_N)


def _end(keys_N: NDArray[np.int64]) -> int:
    return int(keys_N.max(initial=-1)) + 1
