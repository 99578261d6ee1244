"""SGLang and Megatron-Core in turn on one device, for which a CPU stands, with requests in flight at every hand-over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.loop.local import local_run
from tests.loop.test_run import ROWS, vowels
from verst.journal.log import JournalReader
from verst.runtime.actors import spawn
from verst.runtime.placement import Placement
from verst.runtime.service import RunService
from verst.testing import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]  # Ray warns of sockets of its own


@pytest.fixture
def own_ray() -> Iterator[None]:
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("own_ray")
async def test_sglang_and_megatron_take_turns(tmp_path: Path):
    model = tiny_model(tmp_path / "model")
    values = {
        "run": {"name": "turns", "dir": str(tmp_path), "steps": 4, "seed": 1},
        "rollout": {"engine": "sglang", "group_size": 4, "max_new_tokens": 48, "max_running": 8, "capacity_groups": 10},
        "train": {"backend": "megatron", "groups_per_step": 4, "lr": 1e-3, "microbatch_tokens": 256},
        "checkpoint": {"every_steps": 2},
        "weights": {"transport": "shared"},
    }
    run = local_run(tmp_path, model, values, reward=vowels, prompts=ROWS)
    await RunService(str(run.run.root), spawn, Placement(0.0, 0.0, shared=True)).run()
    steps = [row for row in run.rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert max(run.metric("mismatch/probe")) < 1e-5
    assert max(run.metric("mismatch/abs_max")) < 1e-5  # also of tokens whose keys and values were computed anew
    assert min(run.metric("time/lease_s")) > 0
    reader = JournalReader(run.run.journal)
    trajectories = [t for seq in reader.index.groups for t in reader.group(seq).trajectories]
    assert any(len(set(t.versions_T[t.loss_mask_T])) > 1 for t in trajectories), "no request was in flight at a hand-over"
    assert run.metric("rollout/failed") == [0, 0, 0, 0]
    assert (run.run.final / "model.safetensors").exists()
