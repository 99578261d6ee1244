"""Where a transformers model chooses its experts: found by watching it, then recorded or replaced by a recorded choice.

Every family chooses with one `topk` of k experts over the scores of all of them, then takes the weights of the chosen from live scores. So
only that one call is intercepted, inside the forward of the module that makes it; scores, groups, biases and weights stay the family's own.
PyTorch itself is not patched: a `TorchFunctionMode` belongs to the thread that entered it, and sees no other module's calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from verst.errors import InvariantViolation, ModelError
from verst.routing.kinds import routed_experts
from verst.types import RoutedExperts

_TOPK = (torch.topk, torch.Tensor.topk)
_MASKED = (torch.masked_fill, torch.Tensor.masked_fill)
_TRIAL_TOKENS = 2


class Choices:
    """Which experts one pass over N tokens chose, row after row of its tokens."""

    def __init__(self, layers: int, recorded_NLK: torch.Tensor | None = None, free_N: torch.Tensor | None = None) -> None:
        self.recorded_NLK, self.free_N = recorded_NLK, free_N
        self.live_of: list[torch.Tensor | None] = [None] * layers
        self.used_of: list[torch.Tensor | None] = [None] * layers

    def live(self) -> torch.Tensor:
        """[N, L, K] int64, by the router. Raises `InvariantViolation` unless every layer chose."""
        return _stacked(self.live_of)

    def used(self) -> torch.Tensor:
        """[N, L, K] int64, handed on to be computed. Raises `InvariantViolation` unless every layer chose."""
        return _stacked(self.used_of)


class RoutingTap:
    """Follows the routers of one model. Costs nothing while neither `recording` nor `replaying`. One pass at a time.

    `compiled`: layers will be compiled. Routers are then left out of their graphs, because every pass has other routes.
    Finding them runs the model on two tokens. Raises `ModelError` for a model whose layers do not each choose once, by one topk over all
    experts.
    """

    def __init__(self, model: nn.Module, kind: RoutedExperts, *, compiled: bool = False) -> None:
        self.kind = kind
        self._pass: Choices | None = None
        modules = _routing_modules(model, kind)
        for layer, module in enumerate(modules):
            forward = partial(self._forward, layer, module.forward)
            module.forward = torch.compiler.disable(forward) if compiled else forward

    @contextmanager
    def recording(self) -> Iterator[Choices]:
        """Inside, the model's own choices are kept."""
        with self._passing(Choices(self.kind.layers)) as choices:
            yield choices

    @contextmanager
    def replaying(self, recorded_NLK: torch.Tensor, free_N: torch.Tensor | None = None) -> Iterator[Choices]:
        """Inside, token n of a pass uses the experts of row n, in their order, and the router learns by their live weights.

        Those tokens of which `free_N` is true choose for themselves. The backward pass belongs inside too, because checkpointing computes
        layers again there.
        """
        with self._passing(Choices(self.kind.layers, recorded_NLK, free_N)) as choices:
            yield choices

    @contextmanager
    def _passing(self, choices: Choices) -> Iterator[Choices]:
        if self._pass is not None:
            raise InvariantViolation("routes: a pass began before the last one had ended")
        self._pass = choices
        try:
            yield choices
        finally:
            self._pass = None

    def _forward(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._pass is None:
            return forward(*args, **kwargs)
        with _Chosen(self._pass, layer, self.kind):
            return forward(*args, **kwargs)


def tap_of(model: nn.Module, config: Mapping[str, Any]) -> RoutingTap | None:
    """A tap on a model with this config; None for a dense one. Raises `ModelError`, see `RoutingTap`."""
    kind = routed_experts(config)
    return None if kind is None else RoutingTap(model, kind)


class _Chosen(TorchFunctionMode):
    """The forward of one routing module."""

    def __init__(self, choices: Choices, layer: int, kind: RoutedExperts) -> None:
        super().__init__()
        self._choices, self._layer, self._kind = choices, layer, kind
        self._masked: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and _chooses(self._kind, *args, **kwargs):
            return self._choose(func, args, kwargs)
        found = func(*args, **kwargs)
        if func in _MASKED and found.shape[-1] == self._kind.experts:
            self._masked = (found, args[0])
        return found

    def _choose(self, func: Any, args: Any, kwargs: Any) -> Any:
        choices, layer = self._choices, self._layer
        recorded_NLK = choices.recorded_NLK
        if recorded_NLK is None:
            found = func(*args, **kwargs)
            choices.live_of[layer] = choices.used_of[layer] = found[1]
            return found
        scores = args[0] if args else kwargs["input"]
        if len(scores) != len(recorded_NLK):
            raise InvariantViolation(f"routes: a pass over {len(scores)} tokens is to replay those of {len(recorded_NLK)}")
        with torch.no_grad():
            live = choices.live_of[layer] = func(*args, **kwargs)[1]
        if self._masked is not None and scores is self._masked[0]:
            scores = self._masked[1]  # a recorded expert may lie in a group that is masked today: its weight is the unmasked score
        chosen = recorded_NLK[:, layer].long()
        if choices.free_N is not None:
            chosen = torch.where(choices.free_N[:, None], live, chosen)
        choices.used_of[layer] = chosen
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))


def _chooses(kind: RoutedExperts, input: torch.Tensor, k: int, dim: int = -1, **_: Any) -> bool:
    """Whether this topk is the choice of experts; groups, and attention that selects tokens, have other sizes."""
    return k == kind.chosen and input.dim() == 2 and input.shape[1] == kind.experts and dim in (-1, 1)


def _stacked(chosen: list[torch.Tensor | None]) -> torch.Tensor:
    found = [ids for ids in chosen if ids is not None]
    if len(found) != len(chosen):
        raise InvariantViolation(f"routes: only {len(found)} of {len(chosen)} layers chose experts in this pass")
    return torch.stack(found, dim=1)


class _Watch(TorchFunctionMode):
    """Notes in which module each choice of experts is made. `running` are the modules whose forward runs, the outermost first."""

    def __init__(self, kind: RoutedExperts) -> None:
        super().__init__()
        self._kind = kind
        self.running: list[nn.Module] = []
        self.choosing: list[nn.Module] = []

    def enter(self, module: nn.Module, args: object) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and _chooses(self._kind, *args, **kwargs):
            scores = args[0] if args else kwargs["input"]
            self.choosing.extend(self.running[-1:] if len(scores) == _TRIAL_TOKENS else [])
        return func(*args, **kwargs)


@torch.no_grad()
def _routing_modules(model: nn.Module, kind: RoutedExperts) -> list[nn.Module]:
    """The modules that choose experts, in the order in which they do."""
    watch = _Watch(kind)
    tokens = torch.zeros(1, _TRIAL_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(watch.enter).remove)
            hooks.callback(module.register_forward_hook(watch.leave, always_call=True).remove)
        with watch:
            model(input_ids=tokens, use_cache=False)
    found = watch.choosing
    if len(found) != kind.layers or len({id(module) for module in found}) != len(found):
        raise ModelError(
            f"{type(model).__name__}: expert routes cannot be followed. Its config has {kind.layers} layers that choose {kind.chosen} of "
            f"{kind.experts} experts, but in a trial {len(found)} such choices were seen, in {len({id(m) for m in found})} modules; "
            "set train.routes=ignore, or use another engine and backend"
        )
    return found
