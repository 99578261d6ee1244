"""What the tests of whole runs in this process have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from verst.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """For all runs of a module: starting one for each is what would take time."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=1 << 28)
    yield
    ray.shutdown()
