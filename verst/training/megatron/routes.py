"""Recorded expert routes in Megatron's routers (R3, arXiv 2510.11370), and how far the trainer's own choice is from them.

A router of Megatron leaves the choice of experts to its `router_replay`, if it has one. Megatron's own class for that keeps all its
instances in one list of the process, where policy and reference would stand side by side, so each router of the policy gets a `RouterTap`
instead. Only which experts are taken comes from the record: their weights come from the live scores, also of an expert that group-limited
routing would have masked. Auxiliary losses, which Verst leaves at zero, look at the live scores alone; the counts behind an update of the
experts' bias, which Verst leaves as it was loaded, are of the experts that were used.

Who gets which routes: a forward pass takes those of its microbatch from `Routers.during`. A layer that the backward pass computes again
takes them in the order of the forward passes, since each of Megatron's schedules takes a chunk's microbatches back in that order. A layer
will be computed again if the pass keeps gradients and the layer itself runs without, which is how all of Megatron's checkpoints run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from verst.data.packing import samples_of_rank
from verst.errors import InvariantViolation, ModelError
from verst.observe.metrics import Tally
from verst.routing.differences import GIVEN, row_ages, tally_routes
from verst.routing.kinds import moe_layers
from verst.routing.records import expert_dtype, require_routes
from verst.training.megatron import groups
from verst.training.megatron.packed import Packed, RankRoutes
from verst.training.step import LoadedStep
from verst.types import RoutedExperts


class Routers:
    """The routers of this rank's chunks of the policy, wrapped as the schedule runs them.

    Raises `ModelError` if the layers that route are not those that config.json names (`about`).
    """

    def __init__(self, chunks: Sequence[Any], kind: RoutedExperts, about: dict[str, Any], *, replays: bool) -> None:
        numbers = {layer: number for number, layer in enumerate(moe_layers(about))}
        self._kind = kind
        self._taps: dict[Any, list[RouterTap]] = {}
        self.layers: tuple[int, ...] = ()
        """Counted among the model's layers that route, in the order in which this rank holds them."""
        for chunk in chunks:
            found = dict(_routed(chunk))
            _require_named(chunk, found, numbers, kind)
            first = len(self.layers)
            self._taps[chunk] = [RouterTap(moe, first + i, replays=replays) for i, moe in enumerate(found.values())]
            self.layers += tuple(numbers[layer] for layer in found)
        self._measured: list[_Pass] = []

    def require(self, step: LoadedStep) -> None:
        """Raises `RoutesRefused` if a sample that this rank computes has routes missing, or other than of its tokens and `layers`."""
        own = dataclasses.replace(self._kind, layers=len(self.layers))
        for index in samples_of_rank(step.plan, step.rank):
            require_routes(step.batch.samples[index], own)

    def lay_out(self, step: LoadedStep, packed: Packed) -> Packed:
        """The microbatch with the routes of the tokens that this rank holds; as it was if its samples, which nobody sampled, have none."""
        rows = [step.batch.samples[i] for i in packed.indices]
        if all(row.routes is None for row in rows):
            return packed
        total, chosen = sum(packed.lengths), self._kind.chosen
        filler_K = np.arange(chosen, dtype=expert_dtype(self._kind.experts))  # what is filled up needs experts as well
        experts_TLK = np.tile(filler_K, (total, len(self.layers), 1))
        known_T, free_T, ages_T = np.zeros(total, dtype=bool), np.zeros(total, dtype=bool), np.full(total, GIVEN)
        for row, start in zip(rows, np.cumsum([0, *packed.lengths[:-1]]), strict=True):
            span = slice(start, start + len(row.tokens_T) - 1)
            if row.routes is None:
                free_T[span] = True
                continue
            experts_TLK[span], known_T[span], ages_T[span] = row.routes.experts_TLK, True, row_ages(row.versions_T, step.version)
        whole = packed.own_places(groups.context().rank(), groups.context().size())
        # Megatron has layers with experts under tensor parallelism only where its ranks hold different tokens (sequence parallelism).
        own = np.split(whole, groups.tensor().size())[groups.tensor().rank()]
        known_N, device = own[known_T[own]], packed.tokens_BT.device
        routes = RankRoutes(
            experts_TLK=torch.from_numpy(experts_TLK[own]).to(device),
            known_N=torch.from_numpy(np.flatnonzero(known_T[own])).to(device),
            ages_N=ages_T[known_N],
            free_T=torch.from_numpy(free_T[own]).to(device)[:, None] if free_T.any() else None,
        )
        return dataclasses.replace(packed, rank_routes=routes)

    def begin(self) -> None:
        """Before a schedule: forgets what one that failed left behind."""
        self._measured = []
        for taps in self._taps.values():
            for tap in taps:
                tap.begin()

    @contextlib.contextmanager
    def during(self, chunk: Any, packed: Packed, *, measured: bool) -> Iterator[None]:
        """Around one chunk's forward pass of a microbatch, which then has its routes; nothing for a chunk of another model."""
        taps = self._taps.get(chunk, [])
        passing = _Pass(packed.rank_routes, torch.is_grad_enabled(), measured and packed.rank_routes is not None)
        if passing.measured and taps:
            self._measured.append(passing)
        for tap in taps:
            tap.passing = passing
        try:
            yield
        finally:
            for tap in taps:
                tap.passing = None

    def tally(self, tally: Tally) -> None:
        """Adds what the measured passes since `begin` say. Every rank has tokens and layers of its own, so all of them tell."""
        for passing in self._measured:
            routes, places = passing.routes, sorted(passing.live)
            assert routes is not None
            live, used = (torch.stack([ids[place] for place in places], dim=1) for ids in (passing.live, passing.used))
            tally_routes(
                tally,
                self._kind,
                [self.layers[place] for place in places],
                live_NLK=live[routes.known_N],
                used_NLK=used[routes.known_N],
                recorded_NLK=routes.experts_TLK[routes.known_N][:, places],
                ages_N=routes.ages_N,
            )
        self._measured = []


@dataclasses.dataclass(slots=True)
class _Pass:
    """One chunk's forward pass, and the experts [T, K] of each of its layers that were chosen live and that were used."""

    routes: RankRoutes | None
    keeps_gradients: bool
    measured: bool
    live: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    used: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)


class RouterTap:
    """Chooses the experts of one layer; it stands where Megatron has its `RouterReplay`. `place` counts this rank's layers that route."""

    def __init__(self, layer: Any, place: int, *, replays: bool) -> None:
        self._place = place
        self._replays = replays
        self._again: deque[RankRoutes | None] = deque()  # of the forward passes whose layer is computed again, the oldest first
        self.passing: _Pass | None = None  # None: no forward pass runs, so the layer is computed again
        router, dispatcher = layer.router, layer.token_dispatcher
        self._chosen = router.topk
        router.router_replay = self
        self._dispatch = dispatcher.dispatch_preprocess
        dispatcher.dispatch_preprocess = self._watched

    def begin(self) -> None:
        self._again.clear()
        self.passing = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and ids [T, K] of the experts to use, of live scores [T, E]. Megatron calls it by this name."""
        assert default_compute_topk is not None
        routes = self._routes()
        if routes is None or not self._replays:
            values, live = default_compute_topk(scores, topk, num_groups, group_topk)
            self._note_live(live)
            return values, live
        ids = routes.experts_TLK[:, self._place].long()
        if len(ids) != len(scores):
            raise InvariantViolation(f"routes of {len(ids)} tokens for a router that has {len(scores)}")
        if self._is_measured or routes.free_T is not None:
            with torch.no_grad():
                live = default_compute_topk(scores, topk, num_groups, group_topk)[1]
            self._note_live(live)
            ids = ids if routes.free_T is None else torch.where(routes.free_T, live, ids)
        return scores.gather(1, ids), ids

    def _routes(self) -> RankRoutes | None:
        if self.passing is None:
            if not self._again:
                raise InvariantViolation("a router runs outside of a forward pass, and no layer of it waits to be computed again")
            return self._again.popleft()
        if self.passing.keeps_gradients and not torch.is_grad_enabled():
            self._again.append(self.passing.routes)
        return self.passing.routes

    @property
    def _is_measured(self) -> bool:
        return self.passing is not None and self.passing.measured

    def _note_live(self, ids: torch.Tensor) -> None:
        if self.passing is not None and self.passing.measured:
            self.passing.live[self._place] = ids

    def _watched(self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> Any:
        """What the dispatcher is given: `routing_map` [T, E] says which experts each token goes to."""
        if self.passing is not None and self.passing.measured:
            self.passing.used[self._place] = routing_map.byte().topk(self._chosen, dim=1).indices
        return self._dispatch(tokens, routing_map, probs)


def _routed(chunk: Any) -> Iterator[tuple[int, Any]]:
    """The layers of a wrapped chunk that route, by their number in the whole model."""
    for layer in chunk.module.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            yield layer.layer_number - 1, layer.mlp


def _require_named(chunk: Any, found: dict[int, Any], numbers: dict[int, int], kind: RoutedExperts) -> None:
    here = {layer.layer_number - 1 for layer in chunk.module.decoder.layers}
    shapes = {(moe.router.num_experts, moe.router.topk) for moe in found.values()}
    if set(found) != here & set(numbers) or shapes - {(kind.experts, kind.chosen)}:
        raise ModelError(
            f"config.json says that layers {sorted(here & set(numbers))} route, {kind.chosen} of {kind.experts} experts for each token; "
            f"Megatron built {sorted(found)} with (experts, chosen) {sorted(shapes)}: recorded routes would go to other layers"
        )
