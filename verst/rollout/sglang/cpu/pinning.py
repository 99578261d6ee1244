"""Host memory without CUDA. SGLang loads this as a plugin, in every process of a server that runs on a CPU."""

from __future__ import annotations


def unpinned() -> None:
    """SGLang keeps recorded routes in page-locked memory, whatever the device is, and CUDA alone can lock it: keep them in plain memory."""
    import torch
    from sglang.srt.state_capturer import base

    class PlainHostCache(base.BaseHostCache):
        def __init__(self, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu") -> None:
            self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
            self.num_tokens, self.num_layers, self.topk_size, self.name = num_tokens, num_layers, topk_size, name

    base.BaseHostCache = PlainHostCache
