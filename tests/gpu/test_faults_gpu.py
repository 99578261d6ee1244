"""Two trainer ranks whose collectives are NCCL's, killed and stopped in the midst of them: survivors are freed, and no bit changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from tests.faults.campaign import ONE_GPU, Campaign, Cell, digests, on_one_gpu, tell_of_records, under
from tests.faults.conftest import run_of
from verst.fault_injection import FaultInjector
from verst.journal.audit import audit
from verst.runtime import heartbeat
from verst.testing import tiny_model

STEPS = 18
CELLS = [
    Cell("trainer rank 1", "mid-all-reduce"),
    Cell("trainer rank 0", "mid-all-reduce"),
    Cell("trainer rank 1", "mid-all-reduce", kill=False),
    Cell("trainer rank 0", "mid-optimizer"),
    Cell("replica", "mid-publish"),
    Cell("snapshot holder 0", "mid-forward"),
]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers, the compiler and Ray
    pytest.mark.timeout(400),
]


@pytest.fixture
def counted_thrice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that counts one GPU as three: two ranks and a replica share it."""
    monkeypatch.setenv(ONE_GPU, "1")
    ray.init(address="local", num_gpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("counted_thrice")
async def test_ranks_that_die_or_hang_in_a_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 1.0)
    monkeypatch.setattr(heartbeat, "SILENCE_S", 5.0)
    model = tiny_model(tmp_path / "model")
    undisturbed, disturbed = (run_of(tmp_path / name, model, STEPS) for name in ("undisturbed", "disturbed"))
    calm = FaultInjector()
    await under(calm, undisturbed, on_one_gpu(calm.spawn), 1.0)
    assert len(set(digests(undisturbed))) == STEPS
    campaign = Campaign(CELLS)
    tell_of_records(asyncio.get_running_loop(), campaign.moment, monkeypatch.setattr)
    await under(campaign, disturbed, on_one_gpu(campaign.spawn), 1.0)
    assert campaign.unstruck == []
    assert digests(disturbed) == digests(undisturbed)
    assert audit(disturbed.run.journal, disturbed.run.run_id, exact=True).violations == []
