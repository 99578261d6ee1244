"""The `sglang` engine: the `Engine` protocol over one SGLang server.

Who waits for whom: every generation is a `Run` that asks the server for tokens and waits for the answer, or waits at the pause. A pause
takes all requests back from the server, with the tokens they have; `resume` asks for the rest. So each answer of the server is of one
version, the server is idle while paused and can answer the probe, and nothing depends on what a release of SGLang does to requests while
it is paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from verst.errors import DeadlineExceeded, EngineFailure
from verst.protocols import WeightUpdate
from verst.rollout.hf.stop_strings import StopStrings
from verst.rollout.limits import check_request, check_tokens
from verst.rollout.sglang.api import ServerApi, ServerLost
from verst.rollout.sglang.checkpoint import check_fits, headers
from verst.rollout.sglang.connection import Connection, Settings
from verst.rollout.sglang.filters import filters
from verst.rollout.sglang.runs import PauseMode, Run
from verst.rollout.sglang.updates import join_group, load_unverified, load_verified
from verst.types import FinishReason, GenerateRequest, Generation, RoutedExperts
from verst.weights.group import GroupAddress

T = TypeVar("T")

GENERATE_DEADLINE_S = 24 * 3600.0
PAUSE_DEADLINE_S = 60.0
UPDATE_DEADLINE_S = 3600.0
_ASK_AGAIN_S = 0.1
_LAST_WORDS_S = 10.0
_CACHE, _WEIGHTS = "kv_cache", "weights"
"""What SGLang can release, by its own names."""


class SGLangEngine:
    """Decodes up to `max_running` sequences of up to `max_model_tokens` tokens at once, prompt included.

    Args:
        model_path: Hugging Face directory; the server reads it too.
        dtype: "float32" or "bfloat16".
        device: "cpu" or "cuda".
        deterministic: SGLang's deterministic inference. It needs CUDA. Without it `GenerateRequest.seed` has no effect.
        arguments: any argument of SGLang's server but those in `verst.rollout.sglang.arguments.OWNED`.
        url: an external server to use instead of a process of our own. Its API key is read from `VERST_SGLANG_API_KEY`.
        allow_unverified: accept an external server without our plugin: `update_weights` then returns the published checksums unchecked.
        log: file that takes what the server prints. One server at a time may use it.
        version: policy version of the weights in `model_path`.
        start_deadline_s: limit of the server's start.

    Tokens are requested under a cache key of the version that the request was admitted with, so the prefix cache never mixes versions.
    """

    def __init__(  # noqa: PLR0913 - each is a setting of the run
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_running: int,
        max_model_tokens: int,
        deterministic: bool = False,
        arguments: Mapping[str, Any] | None = None,
        url: str | None = None,
        allow_unverified: bool = False,
        log: Path,
        version: int = 0,
        start_deadline_s: float = 900.0,
    ) -> None:
        self._settings = Settings(
            model_path, dtype, device, max_running, max_model_tokens, deterministic, dict(arguments or {}), url, log, start_deadline_s
        )
        self._allow_unverified, self._version = allow_unverified, version
        self._connection = Connection(self._settings, self._ended)
        self._started = False
        self._failure: EngineFailure | None = None
        self._broken = asyncio.Event()
        self._paused = False
        self._retracted = False
        self._half_loaded: str | None = None
        self._released: list[str] = []
        self._runs: dict[str, Run] = {}
        self._sent: dict[str, Run] = {}  # by the server's id
        self._returned = asyncio.Event()
        self._stop_strings: StopStrings | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._nonce = secrets.token_hex(8)
        self._asked = 0
        self._loading: dict[str, float] = {}  # of the last version
        self._counters = dict.fromkeys(("generated_tokens", "prompt_tokens", "prefill_tokens"), 0)

    async def start(self) -> None:
        """Starts the server, or finds the external one. Raises `ConfigError` or `EngineFailure` that says why it does not serve."""
        if self._started:
            raise EngineFailure("the sglang engine was started twice")
        self._started = True
        self._checkpoint = await asyncio.to_thread(headers, self._settings.model_path)
        await self._connection.open()

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`. A prompt that does not fit, and an id that is in flight, are `EngineFailure`s."""
        self._live()
        settings = self._settings
        check_request(request, self._connection.vocab_size, settings.max_model_tokens)
        if filters(request.sampling) and not self._connection.has_filters:
            raise EngineFailure(f"SGLang at {self._api.url} samples with filters only if started with --enable-custom-logit-processor")
        if request.sampling.stop and self._stop_strings is None:
            self._stop_strings = await asyncio.to_thread(StopStrings, settings.model_path)
        if request.id in self._runs:
            raise EngineFailure(f"request {request.id!r} is already in flight: ids must be unique among running requests")
        limit = min(request.sampling.max_new_tokens, settings.max_model_tokens - len(request.tokens_T))
        run = self._runs[request.id] = Run(request, limit, self._cache_key())
        try:
            return run.generation(await self._finish(run))
        except asyncio.CancelledError:
            if run.server_id is not None:
                self._in_background(self._tell_abort([run.server_id]))
            raise
        finally:
            self._runs.pop(request.id, None)

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        """Ends these requests (None: all). Returns when the server was told; their `generate` returns with the tokens so far."""
        self._live()
        chosen = [run for id, run in self._runs.items() if ids is None or id in set(ids)]
        for run in chosen:
            run.aborted = True
            run.changed.set()
        await self._tell_abort([run.server_id for run in chosen if run.server_id is not None])

    async def pause(self, mode: PauseMode | str = PauseMode.IN_PLACE) -> None:
        """Returns when the server runs nothing of ours. Requests in flight go on after `resume` as `mode` says.

        Raises `DeadlineExceeded` if the server does not give requests back.
        """
        self._live()
        self._paused = True
        mode = PauseMode(mode)
        if mode is PauseMode.ABORT:
            await self.abort()
        self._retracted = self._retracted or mode is PauseMode.RETRACT
        await self._take_back()

    async def resume(self) -> None:
        """Raises `EngineFailure` while the weights are no whole version: after an update that broke off, or after their release."""
        self._require_memory("resume")
        if self._half_loaded is not None:
            raise EngineFailure(f"cannot resume: {self._half_loaded}; push the version again, whole")
        if self._retracted:
            self._retracted = False
            await self._or_failure(self._api.flush_cache())
            for run in self._runs.values():
                run.cache_key = self._cache_key()
        self._paused = False
        self._wake()

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        """See `Engine.update_weights`. Raises `WeightMismatch`, naming the tensors, if names, shapes or types do not fit.

        Raises `EngineFailure` for a server without our plugin, unless that is allowed: it cannot say what it holds.
        """
        version = update.manifest.version
        self._require_memory(f"load version {version}")
        if not self._paused or self._sent:
            raise EngineFailure(f"weights of version {version} came while decoding: pause() first")
        verified = self._connection.verified
        if not verified and not self._allow_unverified:
            raise EngineFailure(
                f"SGLang at {self._api.url} runs without Verst's plugin, so nobody can say what weights it holds: start it with "
                "--custom-weight-loader verst.rollout.sglang.plugin.load_published, or allow unverified weights"
            )
        tied = self._connection.tied
        check_fits(update.manifest, self._checkpoint, self._settings.dtype, tied=tied)
        self._half_loaded = f"the update to version {version} broke off"
        if verified:
            loaded = await self._or_failure(load_verified(self._api, update, self._connection.ranks, UPDATE_DEADLINE_S))
        else:
            loaded = await self._or_failure(load_unverified(self._api, update, self._settings.model_path, UPDATE_DEADLINE_S))
        self._half_loaded = None
        self._version = version
        self._loading = {f"weights_{phase}_s": seconds for phase, seconds in loaded.seconds.items()}
        return loaded.checksums

    @property
    def routed_experts(self) -> RoutedExperts | None:
        return None

    @property
    def weight_ranks(self) -> int:
        return self._connection.ranks

    async def join_weight_group(self, address: GroupAddress, first_rank: int, timeout_s: float) -> None:
        """See `Engine.join_weight_group`. Raises `EngineFailure` for a server without our plugin: it cannot be a member."""
        self._live()
        if not self._connection.verified:
            raise EngineFailure(f"SGLang at {self._api.url} runs without Verst's plugin and cannot join: set weights.transport=file")
        await self._or_failure(join_group(self._api, address, first_rank, self._connection.ranks, timeout_s))

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Engine.logprobs`. Raises `EngineFailure` while the weights are no whole version."""
        self._require_memory("compute a probe")
        if self._half_loaded is not None:
            raise EngineFailure(f"no probe: {self._half_loaded}")
        check_tokens("the probe", tokens_T, self._connection.vocab_size, self._settings.max_model_tokens)
        server_id = self._server_id()
        body = {
            "rid": server_id,
            "input_ids": tokens_T.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": server_id,  # of its own: a probe must compute, and leave nothing that others would use
        }
        answer = await self._or_failure(self._api.generate(body, GENERATE_DEADLINE_S))
        found = [entry[0] for entry in answer["meta_info"].get("input_token_logprobs") or ()]
        if len(found) != len(tokens_T) or None in found[1:]:
            raise EngineFailure(f"SGLang at {self._api.url} scored {len(found)} of the probe's {len(tokens_T)} tokens")
        return np.array([0.0, *found[1:]], np.float32)

    async def release_memory(self, *, weights: bool = True) -> None:
        """See `Engine.release_memory`. SGLang frees memory if its server has `enable_memory_saver`; without it nothing is freed."""
        self._live()
        if not self._paused or self._sent:
            raise EngineFailure("the engine's memory is in use: pause() first")
        self._retracted = True
        if weights:
            self._half_loaded = "its weights were released"
        given = [tag for tag in (_CACHE, _WEIGHTS) if tag not in self._released and (weights or tag == _CACHE)]
        self._released += given
        if given:
            await self._or_failure(self._api.memory("release", tuple(given), UPDATE_DEADLINE_S))

    async def resume_memory(self) -> None:
        self._live()
        if self._released:
            await self._or_failure(self._api.memory("resume", tuple(self._released), UPDATE_DEADLINE_S))
        self._released = []

    @property
    def version(self) -> int:
        return self._version

    @property
    def verified(self) -> bool:
        """Whether the server can say what weights it holds."""
        return self._connection.verified

    def stats(self) -> Mapping[str, float]:
        """Counted here: `generated_tokens`, `prompt_tokens`, `prefill_tokens` (not found in the prefix cache), of answers that arrived.

        The server's own, once a second: `server_generated_tokens`, `server_prompt_tokens`, `server_cached_tokens`, `server_running`,
        `server_queued`, `cache_hit_rate`, `server_tokens_per_s`. Of the last version: `weights_receive_s`, `weights_load_s`. SGLang does
        not tell decoding from prefilling: those times are 0.
        """
        server = self._connection.metrics
        queued = min(server.get("server_queued", 0.0), len(self._sent))
        own = {name: float(value) for name, value in self._counters.items()}
        gauges = {"running": len(self._sent) - queued, "waiting": len(self._runs) - len(self._sent) + queued}
        return {"decode_steps": 0.0, "decode_s": 0.0, "prefill_s": 0.0, **server, **own, **gauges, **self._loading}

    async def close(self) -> None:
        """Ends the server and fails what is pending."""
        self._ended(EngineFailure(f"the sglang engine {self._settings.model_path} is closed"))
        for task in self._background:
            task.cancel()
        await self._connection.close()

    async def _finish(self, run: Run) -> FinishReason:
        """Asks the server until the run has ended, waiting while the engine is paused."""
        while True:
            while self._paused and not run.aborted and self._failure is None:
                run.changed.clear()
                await run.changed.wait()
            self._live()
            if run.aborted:
                return FinishReason.ABORT
            had = len(run.tokens)
            finish = run.take(await self._ask(run), self._version)
            self._counters["generated_tokens"] += len(run.tokens) - had
            if self._stopped(run, had):
                return FinishReason.STOP
            if finish is FinishReason.STOP or len(run.tokens) >= run.limit:
                return finish if finish is FinishReason.STOP else FinishReason.LENGTH
            if finish is FinishReason.ABORT and not (run.aborted or self._paused):
                raise EngineFailure(f"SGLang at {self._api.url} ended request {run.request.id} too early, and nobody here asked it to")

    async def _ask(self, run: Run) -> dict[str, Any]:
        server_id = run.server_id = self._server_id()
        self._sent[server_id] = run
        try:
            answer = await self._or_failure(self._api.generate(run.body(server_id), GENERATE_DEADLINE_S))
        finally:
            del self._sent[server_id]
            run.server_id = None
            self._returned.set()
        meta = answer["meta_info"]
        prompt_tokens, cached_tokens = meta.get("prompt_tokens") or 0, meta.get("cached_tokens") or 0
        self._counters["prompt_tokens"] += prompt_tokens
        self._counters["prefill_tokens"] += prompt_tokens - cached_tokens
        return answer

    def _stopped(self, run: Run, had: int) -> bool:
        """Whether one of the tokens after `had` completed a stop string; what came after it is dropped."""
        stop = run.request.sampling.stop
        if not stop or self._stop_strings is None:
            return False
        for count in range(had + 1, len(run.tokens) + 1):
            if self._stop_strings.end(np.array(run.tokens[:count], np.int32), stop):
                run.cut(count)
                return True
        return False

    async def _take_back(self) -> None:
        """Has the server end what it works on, until all of it is here."""
        try:
            async with asyncio.timeout(PAUSE_DEADLINE_S):
                while self._sent:
                    self._live()
                    self._returned.clear()
                    await self._tell_abort(list(self._sent))
                    with contextlib.suppress(TimeoutError):  # one that was still on its way to the server when it was told
                        async with asyncio.timeout(_ASK_AGAIN_S):
                            while self._sent:
                                self._returned.clear()
                                await self._returned.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"waited for SGLang at {self._api.url} to give back {len(self._sent)} requests: not done within {PAUSE_DEADLINE_S:g} s"
            ) from error

    async def _tell_abort(self, server_ids: Sequence[str]) -> None:
        await asyncio.gather(*(self._or_failure(self._api.abort(server_id)) for server_id in server_ids))

    async def _or_failure(self, call: Awaitable[T]) -> T:
        """The call's result, or the engine's failure as soon as it is known. A lost connection is explained by the server's end."""
        task = asyncio.ensure_future(call)
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({task, broken}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except ServerLost as lost:
            await asyncio.wait({broken}, timeout=_LAST_WORDS_S if self._connection.owns_server else 0)
            if self._failure is None:
                raise
            raise EngineFailure(str(self._failure)) from lost
        finally:
            task.cancel()
            broken.cancel()
        self._live()
        raise AssertionError("broken without a failure")

    def _ended(self, failure: EngineFailure) -> None:
        """The engine serves no more: whoever waits gets the reason."""
        if self._failure is None:
            self._failure = failure
        self._broken.set()
        self._wake()

    def _wake(self) -> None:
        for run in self._runs.values():
            run.changed.set()

    def _live(self) -> None:
        if self._failure is not None:
            raise EngineFailure(str(self._failure)) from self._failure
        if not self._connection.is_open:
            raise EngineFailure("the sglang engine is used before start()")

    def _require_memory(self, what: str) -> None:
        self._live()
        if self._released:
            raise EngineFailure(f"cannot {what}: the engine's memory is released; resume_memory() first")

    @property
    def _api(self) -> ServerApi:
        return self._connection.api

    def _cache_key(self) -> str:
        """Of the version now served by this engine, and of no other engine's on the same server."""
        return f"{self._nonce}:{self._version}"

    def _server_id(self) -> str:
        self._asked += 1
        return f"{self._nonce}-{self._asked:012d}"

    def _in_background(self, call: Awaitable[None]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(EngineFailure, DeadlineExceeded):  # a server that has ended runs nothing that could be aborted
                await call

        task = asyncio.ensure_future(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
