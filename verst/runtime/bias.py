"""What is trained against what was generated: are short answers favoured, and are long ones trained later?

Three things favour short answers: a window in which groups pass others that take longer, trajectories that are cut, and groups dropped for
want of signal. Each step tells by how much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from verst.types import Group

_STEPS = 10
"""Over which lengths are compared: one batch's mean says little where lengths are heavy-tailed."""


class Bias:
    """Counts groups as they end and as they are trained."""

    def __init__(self) -> None:
        self._fresh: list[int] = []  # lengths that ended since the last step
        self._steps: deque[tuple[list[int], list[int]]] = deque(maxlen=_STEPS)  # generated, trained
        self._waiting: set[int] = set()
        self._trained: set[int] = set()  # those after the oldest that waits

    def admitted(self, seq: int) -> None:
        self._waiting.add(seq)

    def generated(self, group: Group) -> None:
        """Has ended: a trajectory that was cut counts with the tokens it had, so that the bias of cutting is rather larger than shown."""
        self._fresh += [*_lengths([group]), *group.cut]

    def dropped(self, seq: int) -> None:
        self._waiting.discard(seq)

    def trained(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """Metrics of a step that trains `version`:

        - `bias/length`: mean generated tokens of what was trained over those of what was generated, in the last ten steps
        - `bias/age`: mean staleness of the longer half of the batch's trajectories less that of the other half, in versions
        - `bias/passed`: the most groups admitted later that were trained before one of these
        - `rollout/cut`: share of the trajectories rolled for these groups that was cut
        """
        passed = max((sum(later > group.seq for later in self._trained) for group in groups), default=0)
        numbers = {group.seq for group in groups}
        self._waiting -= numbers
        oldest = min(self._waiting, default=None)
        self._trained = {seq for seq in self._trained | numbers if oldest is not None and seq > oldest}
        self._steps.append((self._fresh, _lengths(groups)))
        self._fresh = []
        generated, trained = ([n for step in self._steps for n in step[kind]] for kind in (0, 1))
        found = {"rollout/cut": _share_cut(groups), "bias/passed": float(passed)}
        if any(generated) and any(trained):
            found["bias/length"] = fmean(trained) / fmean(generated)
        age = _age(groups, version)
        return found if age is None else found | {"bias/age": age}


def _lengths(groups: Iterable[Group]) -> list[int]:
    return [trajectory.generated_tokens for group in groups for trajectory in group.trainable]


def _share_cut(groups: Sequence[Group]) -> float:
    cut = sum(len(group.cut) for group in groups)
    return cut / (cut + sum(len(group.trajectories) for group in groups)) if cut else 0.0


def _age(groups: Sequence[Group], version: int) -> float | None:
    """None if all are of one length, or nothing was sampled."""
    sampled = [(t.generated_tokens, version - oldest) for g in groups for t in g.trainable if (oldest := t.oldest_version) is not None]
    middle = median(length for length, _ in sampled) if sampled else 0
    longer = [staleness for length, staleness in sampled if length > middle]
    others = [staleness for length, staleness in sampled if length <= middle]
    return fmean(longer) - fmean(others) if longer and others else None
