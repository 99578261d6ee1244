"""Engines, as the contract suites open them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.engine_cases import DENSE, ENGINES, SERVED, SGLANG, Opened, opening
from verst.protocols import Engine


@pytest.fixture(params=list(ENGINES))
async def opened(request: pytest.FixtureRequest, models: Callable[[str], Path]) -> AsyncIterator[Opened]:
    """Starts an engine on a model (by its name, llama if none is given)."""
    async with opening(ENGINES[request.param], models) as start:
        yield start


@pytest.fixture(params=SERVED)
async def served(request: pytest.FixtureRequest, models: Callable[[str], Path], servers: Callable[[str], Any]) -> AsyncIterator[Opened]:
    """Like `opened`, for every engine, on the dense model that has an SGLang server."""
    if request.param != SGLANG:
        async with opening(ENGINES[request.param], models) as start:
            yield lambda **options: start(DENSE, **options)
        return
    from tests.contracts.sglang_server import attached

    async with AsyncExitStack() as stack:

        async def attach(**options: Any) -> Engine:
            return await stack.enter_async_context(attached(servers(DENSE), **options))

        yield attach
