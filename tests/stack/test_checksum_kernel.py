"""The GPU kernel of the checksum, run by triton's interpreter: it must give the sums that a CPU gives."""

from __future__ import annotations

import os
import subprocess
import sys

COMPARE = """
import contextlib
import numpy as np
import torch
from verst.weights import checksum, checksum_cuda

torch.cuda.device = lambda device: contextlib.nullcontext()  # the interpreter works on CPU tensors
words = 3 * checksum.ROW_WORDS + 5
tensors = [
    torch.randn(700, 517), torch.randn(3, 5).bfloat16(), torch.empty(0, 3), torch.arange(words), -torch.arange(words),
    torch.tensor(True), (torch.randn(1003) * 100).to(torch.int8), torch.full((7,), -1, dtype=torch.int8),
]
found = checksum_cuda.start_row_sums(tensors, checksum._keys(torch.device("cpu")))()
for tensor, sums in zip(tensors, found, strict=True):
    assert np.array_equal(checksum._host_sums([tensor])[0].reshape(-1, 2), sums), (tensor.dtype, tuple(tensor.shape))
print(len(found))
"""


def test_the_kernel_gives_the_sums_of_a_cpu():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
