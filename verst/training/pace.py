"""How fast a rank computes by itself, and how far it is: the others wait for the slowest, so their times for a step are all alike.

Measured is the forward pass of each decoder layer, from when its parameters are there to its end. With FSDP2 and pipeline stages a rank
waits for nobody in it; ranks that share a layer (tensor, context, expert parallelism) wait for each other, as slow as their slowest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from verst.observe.metrics import Tally
from verst.observe.outliers import LAYER_US, Progress
from verst.observe.stacks import innermost_files


class Pace:
    """Times layers. One that is compiled or recomputed is timed as a whole; hooks are added after those of sharding."""

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passed = 0
        self._seconds = 0.0
        self._tokens = 0  # times layers
        self._entered: Any = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.follow(layers)

    def follow(self, layers: Iterable[nn.Module]) -> None:
        """Times these layers too."""
        for layer in layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)

    def begin(self) -> None:
        """Forgets what was measured so far."""
        self._passed = self._tokens = 0
        self._seconds = 0.0
        self._events.clear()

    def tell(self, tally: Tally) -> None:
        """Adds what was measured since `begin`. On a GPU the passes must have ended, which a loss that was read tells."""
        self._seconds += sum(entered.elapsed_time(left) / 1000 for entered, left in self._events)
        self._events.clear()
        if self._tokens:
            tally.mean(LAYER_US, 1e6 * self._seconds, self._tokens)

    def progress(self) -> Progress:
        return Progress(self._passed, any("/torch/distributed/" in file for file in innermost_files()))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = args[0] if args else options["hidden_states"]
        self._tokens += hidden.numel() // hidden.shape[-1]
        self._entered = self._now()

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._on_gpu:
            self._events.append((self._entered, self._now()))
        else:
            self._seconds += time.perf_counter() - self._entered
        self._passed += 1

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
