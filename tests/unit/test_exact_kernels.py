"""The GPU kernels of `verst.exact` in triton's interpreter, on a CPU: the numbers, against PyTorch in float64, and rows of their own bits.

How a GPU rounds is tested in tests/gpu. The interpreter multiplies no bfloat16, so float16 stands in for it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PRELUDE = """
import torch
generator = torch.Generator().manual_seed(3)
def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)
"""

PRODUCTS = """
from verst.exact.linear_kernels import invariant_product, row_means
for dtype, inner in ((torch.float16, 128), (torch.float16, 72), (torch.float32, 40)):
    left, right, bias = noise(300, inner, dtype=dtype), noise(70, inner, dtype=dtype), noise(70, dtype=dtype)
    for rows in (1, 64, 67, 300):
        for out in (torch.float32, dtype):
            found = invariant_product(left[:rows], right, out, bias)
            exact = left[:rows].double() @ right.double().t() + bias.double()
            torch.testing.assert_close(found.double(), exact, rtol=2**-10 if out == torch.float16 else 1e-5, atol=1e-4)
    few = invariant_product(left[:200], right, torch.float32)
    for rows in (1, 2, 63, 65, 130):
        assert torch.equal(invariant_product(left[:rows], right, torch.float32), few[:rows])
        assert torch.equal(invariant_product(left[200 - rows:200], right, torch.float32), few[200 - rows:])
    strided = noise(20, 2 * inner, dtype=dtype)[:, :inner]
    torch.testing.assert_close(
        invariant_product(strided, right, torch.float32).double(), strided.double() @ right.double().t(), rtol=1e-5, atol=1e-4
    )
assert invariant_product(left[:0], right, torch.float32).shape == (0, 70)
values = 3 + noise(17, 100)
torch.testing.assert_close(row_means(values), values.double().mean(-1).float(), rtol=1e-6, atol=0)
assert torch.equal(row_means(values[4:5]), row_means(values)[4:5])
"""

ATTENTION = """
from verst.exact.attention_kernels import causal_forward, newest_forward

def expected(query, key, value, scale, window):
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    scores = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)

for dtype, dim, value_dim, length, window in (
    (torch.float32, 16, 16, 150, None), (torch.float32, 24, 40, 150, 70), (torch.float16, 64, 64, 70, 5), (torch.float32, 32, 32, 1, None)
):
    heads, kv_heads = 4, 2
    query = noise(2, length, heads, dim, dtype=dtype).transpose(1, 2)  # as models give them: heads are not the outer axis
    key, value = (noise(2, kv_heads, length, width, dtype=dtype) for width in (dim, value_dim))
    found = causal_forward(query, key, value, 0.3, window)
    assert found.shape == (2, length, heads, value_dim)
    tolerance = 0.02 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.double(), expected(query, key, value, 0.3, window), rtol=tolerance, atol=tolerance)
    # A prompt's first tokens alone, and each as the newest of a slot that holds more than it has to see.
    short = length // 2 + 1
    assert torch.equal(causal_forward(query[:, :, :short], key[:, :, :short], value[:, :, :short], 0.3, window), found[:, :short])
    slots = [torch.cat((t, noise(2, kv_heads, 30, t.shape[3], dtype=dtype)), 2) for t in (key, value)]
    for place in sorted({0, length // 3, length - 1}):
        grouped = query[:, :, place].reshape(2, kv_heads, 2, dim)
        filled = torch.tensor([place, place // 2])
        newest = newest_forward(grouped, *slots, filled, 0.3, window).reshape(2, heads, value_dim)
        assert torch.equal(newest[0], found[0, place]), (dim, length, place)
"""


def run(script: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when a kernel is defined
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert not done.returncode, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("script", [PRODUCTS, ATTENTION], ids=["products", "attention"])
def test_kernels_of_a_gpu_in_tritons_interpreter(script: str) -> None:
    run(script)
