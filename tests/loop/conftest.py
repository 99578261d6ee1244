"""What the tests of whole runs in this process have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from verst.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")
