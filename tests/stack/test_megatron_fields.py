"""Fields in the megatron backend: packed samples, a pipeline of two ranks, and a context divided among two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import saved_by_ranks
from tests.stack.megatron_cases import make_megatron, save_model
from tests.unit.field_cases import expected, fields_batch, fields_config, run_steps
from tests.unit.fsdp_cases import largest_difference
from verst.training.distributed import init_distributed, leave_distributed

pytestmark = pytest.mark.slow
BATCHES = [fields_batch(step) for step in (1, 2)]
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "data": {},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}
TOLERANCE = 5e-5


def run_rank(rank: int, directory: str, address: str, path: str) -> None:
    torch.set_num_threads(1)
    init_distributed(rank, 2, address, timeout_s=60)
    found = {name: run_steps(make_megatron(fields_config(path), rank, 2, **arguments), BATCHES) for name, arguments in LAYOUTS.items()}
    torch.save(found, f"{directory}/rank{rank}.pt")
    leave_distributed()


def test_every_layout_sees_them_bit_for_bit(tmp_path: Path):
    path = save_model(tmp_path / "qwen3")
    seen, weights = run_steps(make_megatron(fields_config(path)), BATCHES)
    wanted = [expected(batch) for batch in BATCHES]
    assert [{(name, sample): values for name, sample, values in step} for step in seen] == wanted
    found = saved_by_ranks(run_rank, tmp_path, path, limit_s=200)
    for layout in LAYOUTS:
        for step, batch in enumerate(wanted):
            both = [entry for rank in found for entry in rank[layout][0][step]]
            assert {(name, sample): values for name, sample, values in both} == batch, layout
        assert largest_difference(weights, found[0][layout][1]) < TOLERANCE, layout
