"""CUDA graphs: forward passes of fixed shapes, recorded once and replayed with one launch.

A small model's decode step is some hundred kernels of a few microseconds each. Launched one by one from Python they take ten times longer
than they run. A recording reads its inputs from, and works in, memory that stays in place; weights and the key-value cache do too, since
updates are copied into them, until the engine gives its memory up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, ...]


class ForwardGraphs:
    """Runs functions of one tensor. On a GPU each key is recorded at its first use, with that use's shapes; on a CPU they are just called.

    A function is called up to twice for a recording, so it must be safe to repeat. A model whose forward pass asks the device for values
    cannot be recorded: after the first failure all functions are called as they are, which a warning in the log tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._device = device
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None  # one memory for all recordings: no two run at once, and results are copied out

    def __len__(self) -> int:
        return len(self._recordings)

    def clear(self) -> None:
        """Forgets the recordings, with their memory: they read weights and a cache whose memory is about to move."""
        self._recordings.clear()
        self._pool = None

    def run(
        self, key: Hashable, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`function(inputs)`; `inputs` are on the CPU and go to the device."""
        if not self.enabled:
            return function(inputs.to(self._device))
        recording = self._recordings.get(key)
        if recording is None:
            stream = torch.cuda.current_stream(self._device)
            try:
                recording = self._recordings[key] = self._record(function, inputs.to(self._device))
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a recording that breaks off leaves its own in place
                self.enabled = False
                self._recordings.clear()
                _log.warning("this model's forward pass cannot be recorded as a CUDA graph, so decoding is slower: %s", error)
                return function(inputs.to(self._device))
        recording.inputs.copy_(inputs, non_blocking=True)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)

    def _record(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], inputs: torch.Tensor) -> _Recording:
        # Once outside the graph, and on another stream as recording demands: kernels are loaded, lasting memory is allocated.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            function(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(inputs)
        self._pool = graph.pool()
        return _Recording(graph, inputs, outputs)
