"""SGLang's HTTP interface. The one place that knows how releases 0.5.17 to 0.5.23 differ.

- 0.5.18 and later demand `/begin_weight_update` and `/end_weight_update` around an update from tensors; 0.5.17 answers 404 to them.
- Only later releases return a version for each token range, and 0.5.17 dies of a cache flush while it is paused. So Verst never pauses
  SGLang's scheduler: it takes its requests back (`verst.rollout.sglang.engine`), and every answer is of one version.
- An abort ends every request whose id *begins* with the one given, so ids have one length.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from verst.errors import DeadlineExceeded, EngineFailure
from verst.rollout.sglang.environment import INSTALL
from verst.rollout.sglang.plugin import LOADER

if TYPE_CHECKING:
    import aiohttp

CALL_DEADLINE_S = 60.0
_IDLE_AGAIN_S = 0.02
_KEEP_ALIVE_S = 3.0
"""Below the 5 s after which SGLang closes an idle connection: reusing one at that moment would fail a request."""
_METRICS = {
    "sglang:num_running_reqs": "server_running",
    "sglang:num_queue_reqs": "server_queued",
    "sglang:cache_hit_rate": "cache_hit_rate",
    "sglang:gen_throughput": "server_tokens_per_s",
    "sglang:generation_tokens_total": "server_generated_tokens",
    "sglang:prompt_tokens_total": "server_prompt_tokens",
    "sglang:cached_tokens_total": "server_cached_tokens",
    "sglang:realtime_tokens_total": "processed_tokens",  # the only one that moves before a request has finished
}


class ServerLost(EngineFailure):
    """The connection to the server broke: it died, or the network did."""


class _Nothing:
    """Unpickles as an empty parameter: SGLang wants a tensor beside the name.

    A pickled tensor names the function that torch loads it with, and Megatron-Core, where it is imported, puts in its place one of its
    own, which the server refuses.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        from torch.nn.parameter import Parameter

        return Parameter, ()


class ServerApi:
    """Calls to one server. Every call has a deadline; what the server answers wrongly is an `EngineFailure` with its own message."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._update_sessions = True  # until a server answers that it has none

    def open(self) -> None:
        """Opens the connection pool, in the running event loop. Raises `EngineFailure` with the install line without aiohttp."""
        try:
            import aiohttp
        except ImportError as error:
            raise EngineFailure(f"the sglang engine needs aiohttp, which comes with SGLang. {INSTALL}") from error
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def healthy(self) -> bool:
        """Whether the server says that it serves. Never raises because it is not there."""
        try:
            await self._call("GET", "/health", None, 5.0)
        except (EngineFailure, DeadlineExceeded):
            return False
        return True

    async def info(self) -> dict[str, Any]:
        """The server's version and resolved arguments."""
        return await self._call("GET", "/server_info", None, CALL_DEADLINE_S)

    async def generate(self, body: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        answer = await self._call("POST", "/generate", body, deadline_s)
        if not isinstance(answer, dict) or "output_ids" not in answer or "meta_info" not in answer:
            raise EngineFailure(f"SGLang at {self.url} answered a generation with {answer!r:.200}")
        return answer

    async def abort(self, server_id: str) -> None:
        """Ends one request, which is then answered with what it has. A request that the server does not know is ignored."""
        await self._call("POST", "/abort_request", {"rid": server_id}, CALL_DEADLINE_S)

    async def flush_cache(self, deadline_s: float = CALL_DEADLINE_S) -> None:
        """Empties the prefix cache, once the server is idle.

        A request's answer leaves the server a moment before its scheduler is done with the request; until then it refuses to flush.
        """
        limit = time.monotonic() + deadline_s
        while True:
            try:
                return await self._call("POST", "/flush_cache", None, deadline_s)
            except _BadRequest as refused:
                if time.monotonic() > limit:
                    waited = f"waited for SGLang at {self.url} to be idle: not within {deadline_s:g} s. {refused}"
                    raise DeadlineExceeded(waited) from refused
            await asyncio.sleep(_IDLE_AGAIN_S)

    async def load_published(self, directory: str, ranks: int, deadline_s: float) -> None:
        """Has every rank run the plugin on a directory; returns when all have answered there."""
        payload = base64.b64encode(pickle.dumps([(directory, _Nothing())])).decode()
        body = {"serialized_named_tensors": [payload] * ranks, "load_format": LOADER, "flush_cache": False}
        await self._begin_update(deadline_s)
        try:
            await self._call("POST", "/update_weights_from_tensor", body, deadline_s)
        finally:
            if self._update_sessions:
                await self._call("POST", "/end_weight_update", {}, deadline_s)

    async def load_checkpoint(self, path: str, deadline_s: float) -> None:
        """Has the server load a Hugging Face directory."""
        body = {"model_path": path, "flush_cache": False}
        await self._call("POST", "/update_weights_from_disk", body, deadline_s)

    async def memory(self, action: str, tags: tuple[str, ...], deadline_s: float) -> None:
        """`action`: "release" or "resume"; `tags`: "kv_cache", "weights"."""
        if action == "release":
            await self.flush_cache()  # waits for an idle server: one that is not would die of the release
        await self._call("POST", f"/{action}_memory_occupation", {"tags": list(tags)}, deadline_s)

    async def metrics(self) -> dict[str, float]:
        """The server's counters and gauges that Verst reports, summed over its ranks (rates: averaged). Empty if it has none."""
        text = await self._call("GET", "/metrics", None, CALL_DEADLINE_S, as_text=True)
        values: dict[str, list[float]] = {}
        for line in text.splitlines():
            name, _, rest = line.partition("{")
            if name in _METRICS:
                values.setdefault(_METRICS[name], []).append(float(rest.rpartition("} ")[2]))
        return {name: sum(found) / (len(found) if name.endswith("_rate") else 1) for name, found in values.items()}

    async def _begin_update(self, deadline_s: float) -> None:
        if not self._update_sessions:
            return
        try:
            await self._call("POST", "/begin_weight_update", {}, deadline_s)
        except _NotThere:
            self._update_sessions = False

    async def _call(self, method: str, path: str, body: Any, deadline_s: float, *, as_text: bool = False) -> Any:
        import aiohttp

        if self._session is None or self._session.closed:
            raise EngineFailure(f"the sglang engine at {self.url} is closed or was not started")
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                if response.status >= 400:
                    raise self._refused(path, response.status, await response.text())
                if as_text or response.content_type != "application/json":
                    return await response.text()
                return await response.json()
        except TimeoutError as error:
            raise DeadlineExceeded(f"waited for SGLang at {self.url} to answer {path}: nothing within {deadline_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ServerLost(f"SGLang at {self.url} did not answer {path}: {type(error).__name__}: {error}") from error

    def _refused(self, path: str, status: int, text: str) -> EngineFailure:
        kind = {400: _BadRequest, 404: _NotThere}.get(status, EngineFailure)
        return kind(f"SGLang at {self.url} answered {status} to {path}: {text.strip()[:2000]}")


class _BadRequest(EngineFailure):
    """The server refuses what was asked."""


class _NotThere(EngineFailure):
    """The server has no such path."""
