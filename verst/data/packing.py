"""Which sample is trained in which update, on which rank, in which microbatch. A pure function of lengths, so it can be tested whole.

A microbatch is right-padded: models are causal, so padding behind a sequence cannot change it. It costs rows × longest tokens, or, for a
backend that lays sequences end to end, the sum of their tokens.
All ranks run the same number of microbatches in an update, because each forward and backward of a sharded model is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from verst.config.schema import TrainConfig
from verst.errors import ConfigError, InvariantViolation
from verst.types import Sample

Microbatch = tuple[int, ...]
"""Indices of the samples of one forward, longest first. Empty: this rank has none left and runs a dummy forward."""

Unit = tuple[int, ...]
"""Samples that one microbatch must have together, longest first: a single one, or those of a group."""

Cost = Callable[[Sequence[int], Sequence[int]], int]
"""Tokens that one forward of these samples holds, given the lengths of all."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One optimizer update: `ranks[r]` are the microbatches of rank r, as many on every rank.

    Without samples (all trajectories of its groups failed) there are no microbatches either, and nothing is to be stepped.
    """

    ranks: tuple[tuple[Microbatch, ...], ...]

    @property
    def samples(self) -> tuple[int, ...]:
        """All samples of the update in ascending order; each is in exactly one microbatch."""
        return tuple(sorted(i for rank in self.ranks for microbatch in rank for i in microbatch))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The updates of one step, epoch after epoch: update `epoch · minibatches + minibatch`."""

    updates: tuple[UpdatePlan, ...]
    padding_share: float
    """Share of the tokens in all forwards that is padding, 0 for an empty plan."""


def plan_step(
    lengths: Sequence[int],
    groups: Sequence[int],
    *,
    minibatches: int,
    epochs: int,
    ranks: int,
    microbatch_tokens: int,
    packed: bool = False,
    whole_groups: bool = False,
) -> StepPlan:
    """Plans one step from the length in tokens and the group number of each sample of its batch. Deterministic.

    Groups, in order of their first sample, are cut into `minibatches` contiguous parts, as even as possible. Every epoch has the same
    plan, so a rank meets its own samples again and may keep what it computed for them (`samples_of_rank`).
    With `packed`, samples lie end to end and cost their tokens alone. With `whole_groups`, a microbatch has all samples of its groups.

    Raises `ConfigError` if one sample alone, or a whole group, is longer than `microbatch_tokens`, `InvariantViolation` if the arguments
    make no sense.
    """
    _check(lengths, groups, (minibatches, epochs, ranks), microbatch_tokens)
    cost: Cost = _packed_cost if packed else _padded_cost
    members: dict[int, list[int]] = {}
    for sample, group in enumerate(groups):
        members.setdefault(group, []).append(sample)
    order = list(members)
    parts = []
    for minibatch in range(minibatches):
        own = order[len(order) * minibatch // minibatches : len(order) * (minibatch + 1) // minibatches]
        if whole_groups:
            units = [_unit(members[group], lengths, microbatch_tokens, cost) for group in own]
        else:
            units = [(sample,) for group in own for sample in members[group]]
        parts.append(_plan_update(units, lengths, ranks, microbatch_tokens, cost))
    forwards = [m for update in parts for rank in update.ranks for m in rank]
    held = sum(cost(m, lengths) for m in forwards)
    share = 1 - sum(lengths) / held if held else 0.0
    return StepPlan(tuple(parts) * epochs, share)


def plan_samples(samples: Sequence[Sample], train: TrainConfig, *, ranks: int, packed: bool, whole_groups: bool) -> StepPlan:
    """`plan_step` for the samples of a batch. Whoever plans the same batch with the same arguments gets the same plan."""
    return plan_step(
        [len(s.tokens_T) for s in samples],
        [s.group for s in samples],
        minibatches=train.minibatches,
        epochs=train.epochs,
        ranks=ranks,
        microbatch_tokens=train.microbatch_tokens,
        packed=packed,
        whole_groups=whole_groups,
    )


def samples_of_rank(plan: StepPlan, rank: int) -> tuple[int, ...]:
    """The samples this rank trains in the step, ascending, each once however many epochs there are."""
    return tuple(sorted({i for update in plan.updates for microbatch in update.ranks[rank] for i in microbatch}))


def _unit(samples: Sequence[int], lengths: Sequence[int], budget: int, cost: Cost) -> Unit:
    unit = tuple(sorted(samples, key=lambda i: (-lengths[i], i)))
    if (tokens := cost(unit, lengths)) > budget:
        raise ConfigError(
            f"samples {', '.join(map(str, sorted(unit)))} of the batch belong to one group and need one forward of {tokens} tokens: "
            f"train.microbatch_tokens is {budget}. Raise it to {tokens} or more, or lower the limits on prompt and completion"
        )
    return unit


def _plan_update(units: Sequence[Unit], lengths: Sequence[int], ranks: int, budget: int, cost: Cost) -> UpdatePlan:
    if not units:
        return UpdatePlan(((),) * ranks)
    ordered = sorted(units, key=lambda unit: (-lengths[unit[0]], unit[0]))
    rounds = -(-len(_cut(ordered, lengths, budget, cost)) // ranks)
    cuts = [_samples(cut) for cut in _even_cuts(ordered, lengths, rounds * ranks, budget, cost)]
    cuts.sort(key=lambda m: -cost(m, lengths))  # stable, so still deterministic
    cuts += [()] * (rounds * ranks - len(cuts))
    dealt: list[list[Microbatch]] = [[] for _ in range(ranks)]
    for turn in range(rounds):
        # Like costs meet in one round, where ranks wait for each other; to and fro, so that no rank gets the largest of every round.
        row = cuts[turn * ranks : (turn + 1) * ranks]
        for rank, microbatch in enumerate(row if turn % 2 == 0 else reversed(row)):
            dealt[rank].append(microbatch)
    return UpdatePlan(tuple(tuple(rank) for rank in dealt))


def _even_cuts(ordered: Sequence[Unit], lengths: Sequence[int], count: int, budget: int, cost: Cost) -> list[list[Unit]]:
    """At most `count` microbatches whose largest cost is the least possible; exactly `count` if there are that many units."""
    low, high = max(cost(unit, lengths) for unit in ordered), budget
    while low < high:  # bisection: the number of microbatches never grows with the cost allowed
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(ordered, lengths, middle, cost)) <= count else (middle + 1, high)
    cuts = _cut(ordered, lengths, low, cost)
    while len(cuts) < min(count, len(ordered)):
        largest = max((cut for cut in cuts if len(cut) > 1), key=lambda cut: cost(_samples(cut), lengths))
        at, half = cuts.index(largest), len(largest) // 2
        cuts[at : at + 1] = [largest[:half], largest[half:]]
    return cuts


def _cut(ordered: Sequence[Unit], lengths: Sequence[int], limit: int, cost: Cost) -> list[list[Unit]]:
    """Cuts units, longest first, into the fewest runs that cost at most `limit` each: filling each run is optimal."""
    cuts: list[list[Unit]] = []
    for unit in ordered:
        if cuts and cost(_samples([*cuts[-1], unit]), lengths) <= limit:
            cuts[-1].append(unit)
        else:
            cuts.append([unit])
    return cuts


def _samples(units: Sequence[Unit]) -> Microbatch:
    return tuple(chain.from_iterable(units))


def _padded_cost(microbatch: Sequence[int], lengths: Sequence[int]) -> int:
    return len(microbatch) * lengths[microbatch[0]] if microbatch else 0  # longest first


def _packed_cost(microbatch: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in microbatch)


def _check(lengths: Sequence[int], groups: Sequence[int], counts: tuple[int, int, int], budget: int) -> None:
    if len(lengths) != len(groups):
        raise InvariantViolation(f"packing: {len(lengths)} lengths but {len(groups)} group numbers")
    if min(counts) < 1:
        raise InvariantViolation(f"packing: minibatches, epochs and ranks must be at least 1, not {counts}")
    for sample, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        if length < 1:
            raise InvariantViolation(f"packing: sample {sample} (group {group}) has {length} tokens; there is nothing to train")
        if length > budget:
            raise ConfigError(
                f"sample {sample} of the batch (group {group}) has {length} tokens, more than one forward may hold: "
                f"train.microbatch_tokens is {budget}. Raise it to {length} or more, or lower the limits on prompt and completion"
            )
