"""The fields of one trajectory while it grows: what its environment has given so far."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from verst.errors import EnvironmentFailure
from verst.fields import MAX_FIELDS, Field, PerToken, require_length


class GivenFields:
    """Each `PerToken` is given in parts, turn by turn or all at the end; of other fields the last value stays."""

    def __init__(self) -> None:
        self._fields: dict[str, Field] = {}

    def take(self, given: Mapping[str, Field], generated: int, where: str) -> None:
        """Adds the fields of one reply, after so many generated tokens. Raises `EnvironmentFailure`, which begins with `where`."""
        if len(self._fields | dict(given)) > MAX_FIELDS:
            raise EnvironmentFailure(f"{where} gives its field number {MAX_FIELDS + 1}: a trajectory may have {MAX_FIELDS}")
        for name, value in given.items():
            known = self._fields.get(name, value)
            if type(known) is not type(value):
                raise EnvironmentFailure(
                    f"{where}: field {name!r} is {type(value).__name__}, and was {type(known).__name__} before: give it one kind"
                )
            if isinstance(value, PerToken):
                before = self._numbers(name)
                since = "token generated since it was last given" if len(before) else "token generated so far"
                require_length(name, value, generated - len(before), where, EnvironmentFailure, since)
                value = PerToken(np.concatenate([before, value.values]))
            self._fields[name] = value

    def now(self) -> dict[str, Field]:
        return dict(self._fields)

    def require_whole(self, generated: int, where: str) -> None:
        """Raises `EnvironmentFailure` if one stopped before the trajectory ended."""
        for name, value in self._fields.items():
            if isinstance(value, PerToken):
                require_length(name, value, generated, where, EnvironmentFailure)

    def _numbers(self, name: str) -> np.ndarray:
        known = self._fields.get(name)
        return known.values if isinstance(known, PerToken) else np.zeros(0, np.float32)
