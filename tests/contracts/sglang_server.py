"""SGLang servers that many tests share: a start takes 40 seconds of processor time. Each test attaches an engine of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.contracts.engine_cases import MAX_TOKENS, Update, load, paused
from verst.rollout.sglang import SGLangEngine
from verst.rollout.sglang.connection import API_KEY, Settings
from verst.rollout.sglang.server import ServerProcess

START_DEADLINE_S = 240.0
ATTACH_DEADLINE_S = 30.0  # it runs already
MAX_RUNNING = 6
SERVED: dict[str, dict[str, Any]] = {
    "qwen3": {},
    # It takes long prompts in chunks of 16 tokens, and admits six requests, but has not the memory for four of MAX_TOKENS or six of 100.
    "routed": {
        "record_routes": True,
        "chunked_prefill_size": 16,
        "max_total_tokens": 600,
        "schedule_conservativeness": 0.1,
    },
}
"""The models that tests share a server of, each with how it is served; see the fixture `servers`."""


@dataclass(frozen=True)
class SharedServer:
    """A running server, and how to reach it."""

    path: Path
    dtype: str
    max_tokens: int
    url: str
    api_key: str
    log: Path
    pid: int

    def engine(self, **options: Any) -> SGLangEngine:
        """An engine on this server, not started. Its server has the weights that the last one left."""
        os.environ[API_KEY] = self.api_key  # read when the engine starts
        settings: dict[str, Any] = {"dtype": self.dtype, "max_running": MAX_RUNNING, "max_model_tokens": self.max_tokens, "url": self.url}
        return SGLangEngine(str(self.path), **{**settings, "log": self.log, "start_deadline_s": ATTACH_DEADLINE_S, **options})


@contextmanager
def shared_server(
    path: Path, directory: Path, *, dtype: str = "float32", max_tokens: int = MAX_TOKENS, record_routes: bool = False, **arguments: Any
) -> Iterator[SharedServer]:
    """Serves the model until the block ends, from an event loop in a thread of its own: those of tests end with the test."""
    log = directory / "server.log"
    options = {"max_total_tokens": 16384, **arguments}
    settings = Settings(str(path), dtype, "cpu", MAX_RUNNING, max_tokens, False, options, None, log, START_DEADLINE_S, record_routes)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shared sglang server", daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(START_DEADLINE_S + 30)

    process = ServerProcess(settings.server_arguments(), device="cpu", log=log)
    api = run(process.start(START_DEADLINE_S))
    try:
        with patch.dict(os.environ):
            yield SharedServer(path, dtype, max_tokens, api.url, process.api_key, log, process.pid)
    finally:
        run(api.close())
        run(process.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@asynccontextmanager
async def attached(server: SharedServer, **options: Any) -> AsyncIterator[SGLangEngine]:
    """An engine at version 3 with the model's own weights, whatever the test before did to them."""
    engine = server.engine(version=3, **options)
    try:
        await engine.start()
        async with paused(engine):
            await engine.update_weights(Update({name: p.detach() for name, p in load(server.path).named_parameters()}, 3))
        yield engine
    finally:
        await engine.close()
