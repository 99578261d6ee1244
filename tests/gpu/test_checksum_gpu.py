"""The hash of published weights: what a GPU computes is what a CPU computes."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_weights_checksum import DTYPES
from verst.weights.checksum import ROW_WORDS, tensor_checksum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_and_gpu_agree(dtype: torch.dtype) -> None:
    tensor = (torch.randn(700, 517) * 3).to(torch.float16).to(dtype)
    assert tensor_checksum(tensor.cuda()) == tensor_checksum(tensor)
    assert tensor_checksum(tensor.cuda().T) == tensor_checksum(tensor.T)


def test_cpu_and_gpu_agree_on_more_than_one_chunk() -> None:
    words = 3 * 2048 * ROW_WORDS + 5  # 192 MiB and a bit: a GPU reads 64 MiB at a time, a CPU 0.5
    tensor = torch.arange(words, dtype=torch.int64)
    assert tensor_checksum(tensor.cuda()) == tensor_checksum(tensor)
