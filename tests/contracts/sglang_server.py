"""One SGLang server for a whole module of tests: a start takes 10 to 20 seconds. Each test attaches an engine of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from verst.rollout.sglang import SGLangEngine
from verst.rollout.sglang.connection import API_KEY, Settings
from verst.rollout.sglang.server import ServerProcess

START_DEADLINE_S = 240.0
ATTACH_DEADLINE_S = 30.0  # it runs already
MAX_RUNNING = 6


@dataclass(frozen=True)
class SharedServer:
    """A running server, and how to reach it."""

    path: Path
    dtype: str
    max_tokens: int
    url: str
    log: Path
    pid: int

    def engine(self, **options: Any) -> SGLangEngine:
        """An engine on this server, not started. Its server has the weights that the last one left."""
        settings: dict[str, Any] = {"dtype": self.dtype, "max_running": MAX_RUNNING, "max_model_tokens": self.max_tokens, "url": self.url}
        return SGLangEngine(str(self.path), **{**settings, "log": self.log, "start_deadline_s": ATTACH_DEADLINE_S, **options})


@contextmanager
def shared_server(
    path: Path, directory: Path, *, dtype: str = "float32", max_tokens: int, record_routes: bool = False, **arguments: Any
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
        with patch.dict(os.environ, {API_KEY: process.api_key}):
            yield SharedServer(path, dtype, max_tokens, api.url, log, process.pid)
    finally:
        run(api.close())
        run(process.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
