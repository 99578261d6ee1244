"""The server behind an engine: a process of ours or an external one, what it says about itself, and the watch over it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verst import secrets
from verst.errors import ConfigError, DeadlineExceeded, EngineFailure, ModelError
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.arguments import refuse_owned, refuse_unroutable
from verst.rollout.sglang.cpu import arguments as cpu_arguments
from verst.rollout.sglang.plugin import LOADER
from verst.rollout.sglang.routes import FLAG, MOVES_CACHE, RouteReader
from verst.rollout.sglang.server import ServerProcess

API_KEY = "VERST_SGLANG_API_KEY"
"""Environment variable with the API key of an external server."""

WATCH_INTERVAL_S = 1.0
SILENCE_S = 120.0
"""A server that answers nothing for so long is lost. Kernel compilation and weight loading run beside the process that answers."""

_MARGIN_TOKENS = 8
"""SGLang refuses inputs of its context length less seven tokens or more; a probe may have `max_model_tokens`."""


@dataclass(frozen=True)
class Settings:
    """What an engine was made with; see `SGLangEngine`."""

    model_path: str
    dtype: str
    device: str
    max_running: int
    max_model_tokens: int
    deterministic: bool
    arguments: dict[str, Any]
    url: str | None
    log: Path
    start_deadline_s: float
    record_routes: bool = False

    def server_arguments(self) -> dict[str, Any]:
        """All arguments of a server of ours: Verst's, the device's, and the user's over those. Raises `ConfigError`."""
        refuse_owned(self.arguments)
        routes = self.record_routes and RouteReader.of(model_config(self.model_path)) is not None
        if routes:
            refuse_unroutable(self.arguments)
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype {self.dtype!r} is none of float32, bfloat16")
        if self.deterministic and self.device == "cpu":
            raise ConfigError("run.deterministic: SGLang has no deterministic mode on a CPU: set it to false, or use the hf engine")
        if self.dtype == "float32" and self.device != "cpu":  # its rmsnorm takes no other; it says so after minutes, deep in a traceback
            raise ConfigError("model.dtype float32: SGLang's kernels for GPUs compute in bfloat16: set it to that, or use the hf engine")
        room = self.max_model_tokens + _MARGIN_TOKENS
        return {
            "model_path": self.model_path,
            "dtype": self.dtype,
            "device": self.device,
            "max_running_requests": self.max_running,
            "context_length": room,
            "skip_tokenizer_init": True,
            "custom_weight_loader": [LOADER],
            "enable_custom_logit_processor": True,
            "enable_metrics": True,
            "skip_server_warmup": True,
            **({"enable_deterministic_inference": True} if self.deterministic else {}),
            **({FLAG: True} if routes else {}),
            **(cpu_arguments(2 * self.max_running * room) if self.device == "cpu" else {}),
            "log_level_http": "warning",
            **self.arguments,
        }


class Connection:
    """Opens and watches one server; `ended` is called once if it is lost."""

    def __init__(self, settings: Settings, ended: Callable[[EngineFailure], None]) -> None:
        self._settings, self._ended = settings, ended
        self._server: ServerProcess | None = None
        self._api: ServerApi | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self.metrics: dict[str, float] = {}
        self.is_open = False
        self.verified = self.has_filters = False
        self.ranks = 1
        config = model_config(settings.model_path)
        self.reader = RouteReader.of(config) if settings.record_routes else None
        text = config.get("text_config", config)
        self.vocab_size = int(text["vocab_size"])
        self.tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))

    @property
    def api(self) -> ServerApi:
        if self._api is None:
            raise EngineFailure("the sglang engine is used before start()")
        return self._api

    @property
    def owns_server(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        """Starts or finds the server and learns what it can do. Raises `ConfigError` or `EngineFailure`; nothing is left running then."""
        settings = self._settings
        try:
            if settings.url is None:
                self._server = ServerProcess(settings.server_arguments(), device=settings.device, log=settings.log)
                self._api = await self._server.start(settings.start_deadline_s)
                self._watchers.append(asyncio.create_task(self._watch_process(self._server)))
            else:
                self._api = await self._find(settings.url)
            self._learn(await self._api.info())
        except BaseException:
            await self.close()
            raise
        self._watchers.append(asyncio.create_task(self._watch_answers()))
        self.is_open = True

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._api is not None:
            await self._api.close()
        if self._server is not None:
            await self._server.stop()

    async def _find(self, url: str) -> ServerApi:
        api = ServerApi(url, secrets.value(API_KEY))
        api.open()
        self._api = api
        limit = time.monotonic() + self._settings.start_deadline_s
        while not await api.healthy():
            if time.monotonic() > limit:
                limit_s = self._settings.start_deadline_s
                raise EngineFailure(f"no SGLang server answers at {url} within {limit_s:g} s: is it up, and its key in {API_KEY}?")
            await asyncio.sleep(WATCH_INTERVAL_S)
        return api

    def _learn(self, info: dict[str, Any]) -> None:
        """What the server can do, and whether it fits. Raises `EngineFailure` if it does not."""
        settings = self._settings
        self.verified = LOADER in (info.get("custom_weight_loader") or ())
        self.has_filters = bool(info.get("enable_custom_logit_processor"))
        self.ranks = int(info.get("tp_size") or 1)
        room = info.get("context_length")
        if room is not None and room < settings.max_model_tokens:
            raise EngineFailure(f"SGLang at {self.api.url} has a context of {room} tokens, {settings.max_model_tokens} are needed")
        if info.get("dtype") not in (None, "auto", settings.dtype):
            raise EngineFailure(f"SGLang at {self.api.url} runs in {info['dtype']}, not in {settings.dtype} (model.dtype)")
        if self.reader is not None:
            self._require_routes(info)

    def _require_routes(self, info: dict[str, Any]) -> None:
        if not info.get(FLAG):
            raise EngineFailure(
                f"SGLang at {self.api.url} does not record expert routes: start it with --{FLAG.replace('_', '-')}, "
                "or set train.routes=ignore"
            )
        for name in MOVES_CACHE:
            if info.get(name):
                option = name.replace("_", "-")
                raise EngineFailure(
                    f"SGLang at {self.api.url} records wrong routes with --{option}: start it without, or set train.routes=ignore"
                )

    async def _watch_process(self, server: ServerProcess) -> None:
        self._ended(await server.ended())

    async def _watch_answers(self) -> None:
        """Reads the server's metrics once a second, and notices when it stops answering."""
        heard = time.monotonic()
        while True:
            try:
                self.metrics = await self.api.metrics()
                heard = time.monotonic()
            except (EngineFailure, DeadlineExceeded) as error:
                if time.monotonic() - heard > SILENCE_S:
                    self._ended(EngineFailure(f"SGLang has not answered for {SILENCE_S:g} s: {error}"))
                    return
            await asyncio.sleep(WATCH_INTERVAL_S)


def model_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text())
        config.get("text_config", config)["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file} is not the config of a Hugging Face model: {error}") from error
    return config
