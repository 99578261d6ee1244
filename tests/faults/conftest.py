"""What the tests of faults have in common."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import MARK, Campaign, Cell
from verst.journal.log import Journal
from verst.testing import tiny_model

Make = Callable[[list[Cell]], Campaign]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def token() -> Iterator[str]:
    """Marks every process that is started from here on. To be asked for before `one_ray`."""
    os.environ[MARK] = uuid.uuid4().hex
    yield os.environ[MARK]
    del os.environ[MARK]


@pytest.fixture
async def campaign(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes one that also knows the moments of the loop itself: a record on its way to the disk."""
    loop = asyncio.get_running_loop()
    made: list[Campaign] = []
    for name in ("append_group", "append_commit"):
        original = getattr(Journal, name)

        def told(self: Journal, *record: Any, original: Any = original, name: str = name) -> None:
            loop.call_soon_threadsafe(made[-1].moment, name)
            original(self, *record)

        monkeypatch.setattr(Journal, name, told)

    def make(cells: list[Cell]) -> Campaign:
        made.append(Campaign(cells))
        return made[-1]

    return make
