"""Fields on two ranks: each token of every sample has its own values there too, and the same weights come of them as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import saved_by_ranks
from tests.unit.field_cases import expected, fields_batch, fields_config, run_steps
from tests.unit.fsdp_cases import largest_difference, make_backend, save_model
from verst.journal.codec import decode_batch, encode_batch
from verst.training.distributed import init_distributed, leave_distributed

pytestmark = pytest.mark.slow
BATCHES = [fields_batch(step) for step in (1, 2)]
TOLERANCE = 5e-5


def run_rank(rank: int, directory: str, address: str, path: str) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, 2, address, timeout_s=60)
    backend = make_backend(fields_config(path, minibatches=2), rank, 2)
    torch.save(run_steps(backend, [decode_batch(encode_batch(batch)) for batch in BATCHES]), f"{directory}/rank{rank}.pt")
    leave_distributed()


def test_two_ranks_see_what_one_sees(tmp_path: Path):
    path = save_model(tmp_path / "llama")
    alone, weights = run_steps(make_backend(fields_config(path, minibatches=2)), BATCHES)
    (first, weights_of_two), (second, _) = saved_by_ranks(run_rank, tmp_path, path)
    for step, batch in enumerate(BATCHES):
        seen: dict[tuple[str, int], Any] = {(name, sample): values for name, sample, values in (*first[step], *second[step])}
        assert len(first[step]) + len(second[step]) == len(seen) == 3 * len(batch.samples), "each sample is on one rank"
        assert first[step]
        assert second[step]
        assert seen == expected(batch) == {(name, sample): values for name, sample, values in alone[step]}
    assert largest_difference(weights, weights_of_two) < TOLERANCE
