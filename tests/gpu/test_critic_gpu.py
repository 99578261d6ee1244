"""PPO's critic on a GPU: as on a CPU, and with the same bits each time."""

from __future__ import annotations

import pytest
import torch

from tests.unit.fsdp_cases import BATCHES, largest_difference, make_backend, make_config, path, same_bits, train, weights_of
from tests.unit.test_fsdp_critic import PPO, critic_of

__all__ = ["path"]  # a fixture

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers and the compiler
]


def test_a_critic_on_a_gpu(path: str) -> None:
    config = make_config(path, train={"minibatches": 2}, algorithm={**PPO, "critic_lr": 1e-3})
    backends = [make_backend(config, device=device) for device in ("cpu", "cuda", "cuda")]
    for backend in backends:
        train(backend, config, BATCHES)
    cpu, gpu, again = (
        [{name: tensor.cpu() for name, tensor in of(backend).items()} for of in (weights_of, critic_of)] for backend in backends
    )
    for on_cpu, on_gpu, repeated in zip(cpu, gpu, again, strict=True):
        assert largest_difference(on_cpu, on_gpu) < 1e-3
        assert same_bits(on_gpu, repeated)
