"""The `sglang` engine: the `Engine` protocol over one SGLang server.

Who waits for whom: every generation is a `Run` that asks the server for tokens and waits for the answer, or waits at the pause. A pause
takes all requests back from the server, with the tokens they have; `resume` asks for the rest. So each answer of the server is of one
version, the server is idle while paused and can answer the probe, and nothing depends on what a release of SGLang does to requests while
it is paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verst.errors import EngineFailure
from verst.protocols import WeightUpdate
from verst.rollout.hf.stop_strings import StopStrings
from verst.rollout.limits import check_request, check_tokens
from verst.rollout.sglang.api import ServerApi
from verst.rollout.sglang.calls import GENERATE_DEADLINE_S, Calls
from verst.rollout.sglang.checkpoint import check_fits, headers
from verst.rollout.sglang.connection import Connection, Settings
from verst.rollout.sglang.filters import filters
from verst.rollout.sglang.runs import Run
from verst.rollout.sglang.updates import join_group, load_unverified, load_verified
from verst.types import FinishReason, GenerateRequest, Generation, PauseMode, RoutedExperts
from verst.weights.group import GroupAddress

UPDATE_DEADLINE_S = 3600.0
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
        record_routes: record the expert routes of a Mixture-of-Experts model. It changes nothing for a dense one.
        start_deadline_s: limit of the server's start.

    Tokens are requested under a cache key of the version that generated the request's first token, so no request begins with what older
    weights left in the prefix cache.
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
        record_routes: bool = False,
    ) -> None:
        self._settings = Settings(
            model_path,
            dtype,
            device,
            max_running,
            max_model_tokens,
            deterministic,
            dict(arguments or {}),
            url,
            log,
            start_deadline_s,
            record_routes,
        )
        self._allow_unverified, self._version = allow_unverified, version
        self._connection = Connection(self._settings, self._ended)
        self._calls = Calls(self._connection)
        self._started = False
        self._paused = False
        self._retracted = False
        self._half_loaded: str | None = None
        self._released: list[str] = []
        self._runs: dict[str, Run] = {}
        self._stop_strings: StopStrings | None = None
        self._loading: dict[str, float] = {}  # of the last version

    async def start(self) -> None:
        """Starts the server, or finds the external one. Raises `ConfigError` or `EngineFailure` that says why it does not serve."""
        if self._started:
            raise EngineFailure("the sglang engine was started twice")
        self._started = True
        self._checkpoint = await asyncio.to_thread(headers, self._settings.model_path)
        await self._connection.open()

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`. A prompt that does not fit, and an id that is in flight, are `EngineFailure`s.

        Raises `RoutesRefused` if the server's routes are not those of the tokens.
        """
        self._calls.live()
        settings = self._settings
        check_request(request, self._connection.vocab_size, settings.max_model_tokens)
        if filters(request.sampling) and not self._connection.has_filters:
            raise EngineFailure(f"SGLang at {self._api.url} samples with filters only if started with --enable-custom-logit-processor")
        if request.sampling.stop and self._stop_strings is None:
            self._stop_strings = await asyncio.to_thread(StopStrings, settings.model_path)
        if request.id in self._runs:
            raise EngineFailure(f"request {request.id!r} is already in flight: ids must be unique among running requests")
        limit = min(request.sampling.max_new_tokens, settings.max_model_tokens - len(request.tokens_T))
        run = self._runs[request.id] = Run(request, limit, self._calls.nonce, self._version, self._connection.reader)
        try:
            return run.generation(await self._finish(run))
        finally:
            self._runs.pop(request.id, None)

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        """Ends these requests (None: all). Returns when the server works on them no more; their `generate` returns with the tokens so far.

        Raises `DeadlineExceeded` if the server does not give them back.
        """
        self._calls.live()
        chosen = [run for id, run in self._runs.items() if ids is None or id in set(ids)]
        for run in chosen:
            run.aborted = True
            run.changed.set()
        await self._calls.take_back(chosen)

    async def in_flight(self) -> Sequence[Generation]:
        """See `Engine.in_flight`. What the server has generated is known when it answers: at every pause, which takes all requests back."""
        return [run.generation(FinishReason.ABORT) for run in self._runs.values() if run.tokens]

    async def pause(self, mode: PauseMode = PauseMode.IN_PLACE) -> None:
        """Returns when the server runs nothing of ours. Requests in flight go on after `resume` as `mode` says.

        Raises `DeadlineExceeded` if the server does not give requests back.
        """
        self._calls.live()
        self._paused = True
        if mode is PauseMode.ABORT:
            await self.abort()
        self._retracted = self._retracted or mode is PauseMode.RETRACT
        await self._calls.take_back()

    async def resume(self) -> None:
        """Raises `EngineFailure` while the weights are no whole version: after an update that broke off, or after their release."""
        self._require_memory("resume")
        if self._half_loaded is not None:
            raise EngineFailure(f"cannot resume: {self._half_loaded}; push the version again, whole")
        if self._retracted:
            self._retracted = False
            await self._calls.or_failure(self._api.flush_cache())
            for run in self._runs.values():
                run.cached_under = self._version
        self._paused = False
        self._wake()

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        """See `Engine.update_weights`. Raises `WeightMismatch`, naming the tensors, if names, shapes or types do not fit.

        Raises `EngineFailure` for a server without our plugin, unless that is allowed: it cannot say what it holds.
        """
        version = update.manifest.version
        self._require_memory(f"load version {version}")
        if not self._paused or self._calls.sent:
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
            loaded = await self._calls.or_failure(load_verified(self._api, update, self._connection.ranks, UPDATE_DEADLINE_S))
        else:
            loaded = await self._calls.or_failure(load_unverified(self._api, update, self._settings.model_path, UPDATE_DEADLINE_S))
        self._half_loaded = None
        self._version = version
        self._loading = {f"weights_{phase}_s": seconds for phase, seconds in loaded.seconds.items()}
        return loaded.checksums

    @property
    def routed_experts(self) -> RoutedExperts | None:
        reader = self._connection.reader
        return None if reader is None else reader.kind

    @property
    def weight_ranks(self) -> int:
        return self._connection.ranks

    async def join_weight_group(self, address: GroupAddress, first_rank: int, timeout_s: float) -> None:
        """See `Engine.join_weight_group`. Raises `EngineFailure` for a server without our plugin: it cannot be a member."""
        self._calls.live()
        if not self._connection.verified:
            raise EngineFailure(f"SGLang at {self._api.url} runs without Verst's plugin and cannot join: set weights.transport=file")
        await self._calls.or_failure(join_group(self._api, address, first_rank, self._connection.ranks, timeout_s))

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Engine.logprobs`. Raises `EngineFailure` while the weights are no whole version."""
        self._require_memory("compute a probe")
        if self._half_loaded is not None:
            raise EngineFailure(f"no probe: {self._half_loaded}")
        check_tokens("the probe", tokens_T, self._connection.vocab_size, self._settings.max_model_tokens)
        server_id = self._calls.new_id()
        body = {
            "rid": server_id,
            "input_ids": tokens_T.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": server_id,  # of its own: a probe must compute, and leave nothing that others would use
        }
        answer = await self._calls.or_failure(self._api.generate(body, GENERATE_DEADLINE_S))
        found = [entry[0] for entry in answer["meta_info"].get("input_token_logprobs") or ()]
        if len(found) != len(tokens_T) or None in found[1:]:
            raise EngineFailure(f"SGLang at {self._api.url} scored {len(found)} of the probe's {len(tokens_T)} tokens")
        return np.array([0.0, *found[1:]], np.float32)

    async def release_memory(self, *, weights: bool = True) -> None:
        """See `Engine.release_memory`. SGLang frees memory if its server has `enable_memory_saver`; without it nothing is freed."""
        self._calls.live()
        if not self._paused or self._calls.sent:
            raise EngineFailure("the engine's memory is in use: pause() first")
        self._retracted = True
        if weights:
            self._half_loaded = "its weights were released"
        given = [tag for tag in (_CACHE, _WEIGHTS) if tag not in self._released and (weights or tag == _CACHE)]
        self._released += given
        if given:
            await self._calls.or_failure(self._api.memory("release", tuple(given), UPDATE_DEADLINE_S))

    async def resume_memory(self) -> None:
        self._calls.live()
        if self._released:
            await self._calls.or_failure(self._api.memory("resume", tuple(self._released), UPDATE_DEADLINE_S))
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
        `server_queued`, `cache_hit_rate`, `server_tokens_per_s`, and `processed_tokens`, the only counter that moves before requests
        end. Of the last version: `weights_receive_s`, `weights_load_s`. SGLang does not tell decoding from prefilling: those times are 0.
        """
        server = self._connection.metrics
        queued = min(server.get("server_queued", 0.0), len(self._calls.sent))
        own = {name: float(value) for name, value in self._calls.counters.items()}
        gauges = {"running": len(self._calls.sent) - queued, "waiting": len(self._runs) - len(self._calls.sent) + queued}
        return {"decode_steps": 0.0, "decode_s": 0.0, "prefill_s": 0.0, **server, **own, **gauges, **self._loading}

    async def check(self) -> None:
        """See `Engine.check`: its server has ended, or has not answered for long."""
        self._calls.live()

    async def close(self) -> None:
        """Ends the server and fails what is pending."""
        self._ended(EngineFailure(f"the sglang engine {self._settings.model_path} is closed"))
        self._calls.close()
        await self._connection.close()

    async def _finish(self, run: Run) -> FinishReason:
        """Asks the server until the run has ended, waiting while the engine is paused."""
        while True:
            while self._paused and not run.aborted and self._calls.failure is None:
                run.changed.clear()
                await run.changed.wait()
            self._calls.live()
            if run.aborted:
                return FinishReason.ABORT
            had = len(run.tokens)
            finish = await self._more(run)
            self._calls.counters["generated_tokens"] += len(run.tokens) - had
            if self._stopped(run, had):
                return FinishReason.STOP
            if finish is FinishReason.STOP or len(run.tokens) >= run.limit:
                return finish if finish is FinishReason.STOP else FinishReason.LENGTH
            if finish is FinishReason.ABORT and not (run.aborted or self._paused):
                raise EngineFailure(f"SGLang at {self._api.url} ended request {run.request.id} too early, and nobody here asked it to")

    async def _more(self, run: Run) -> FinishReason:
        """Asks the server once. `ABORT`: it ended the question before its end."""
        if not run.tokens:
            run.cached_under = self._version
        newest_LK = None
        if run.needs_newest(self._version):
            newest_LK = run.newest_row(await self._calls.ask(run, run.newest_body))
            if newest_LK is None or self._paused or run.aborted:
                return FinishReason.ABORT
        return run.take(await self._calls.ask(run, run.body), self._version, newest_LK)

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

    def _ended(self, failure: EngineFailure) -> None:
        """The engine serves no more: whoever waits gets the reason."""
        self._calls.ended(failure)
        self._wake()

    def _wake(self) -> None:
        for run in self._runs.values():
            run.changed.set()

    def _require_memory(self, what: str) -> None:
        self._calls.live()
        if self._released:
            raise EngineFailure(f"cannot {what}: the engine's memory is released; resume_memory() first")

    @property
    def _api(self) -> ServerApi:
        return self._connection.api
