"""The `hf` engine: the `Engine` protocol over a decoder in a thread of its own.

Who waits for whom: the async methods put commands to the decode thread and await their futures; the thread runs commands in order and
one decoding step whenever none is waiting. A pause is a command, so once it is answered no forward pass runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from verst.errors import EngineFailure, VerstError
from verst.protocols import WeightUpdate
from verst.rollout.hf.decoder import Decoder
from verst.rollout.hf.model import SlotModel
from verst.rollout.hf.worker import DecodeThread
from verst.types import GenerateRequest, Generation, PauseMode, RoutedExperts
from verst.weights.group import GroupAddress, GroupUpdate, Member, join

T = TypeVar("T")

CLOSE_DEADLINE_S = 60.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HFEngine:
    """Decodes up to `max_running` sequences of up to `max_model_tokens` tokens at once, prompt included.

    `deterministic`: a sequence's tokens and log-probabilities depend, bit for bit, on weights, tokens and seed alone; without it a step
    computes only the rows in use. `dtype` is "float32" or "bfloat16"; `threads` are CPU threads of the decode thread (None: as it is).
    `record_routes`: records the expert routes of a Mixture-of-Experts model; it changes nothing for a dense one.
    """

    def __init__(  # noqa: PLR0913 - each is a setting of the run
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_running: int,
        max_model_tokens: int,
        deterministic: bool,
        record_routes: bool = False,
        threads: int | None = None,
        version: int = 0,
    ) -> None:
        self._path, self._dtype, self._device = model_path, dtype, device
        self._slots, self._max_tokens, self._deterministic, self._threads = max_running, max_model_tokens, deterministic, threads
        self._record_routes = record_routes
        self._version = version
        self._thread: DecodeThread | None = None
        self._decoder: Decoder | None = None
        self._fresh: list[tuple[GenerateRequest, Future[Generation]]] = []  # of this turn of the event loop
        self._member: Member | None = None
        # Below: touched by the decode thread only.
        self._paused = False
        self._half_loaded: str | None = None  # why the weights are no whole version
        self._released = False
        self._pending: dict[str, Future[Generation]] = {}

    async def start(self) -> None:
        """Loads and checks the model. Raises `ModelError` or `EngineFailure`, which name the directory or the model type."""
        if self._thread is not None:
            raise EngineFailure("the hf engine was started twice")
        self._thread = DecodeThread(f"hf engine {self._path}", self._step, self._fail_pending)
        try:
            await self._call(self._load)
        except VerstError:
            await self.close()
            raise

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`. A cancelled call ends its request; a prompt that does not fit is an `EngineFailure`."""
        answer: Future[Generation] = Future()
        answer.set_running_or_notify_cancel()
        self._live_thread()
        self._fresh.append((request, answer))
        if len(self._fresh) == 1:
            asyncio.get_running_loop().call_soon(self._send_fresh)
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            with contextlib.suppress(EngineFailure):  # an engine that has ended runs nothing that could be aborted
                self._command(lambda: self._abort([request.id]))
            raise

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        await self._call(lambda: self._abort(ids))

    async def in_flight(self) -> Sequence[Generation]:
        return await self._call(lambda: self._loaded().in_flight())

    async def pause(self, mode: PauseMode = PauseMode.IN_PLACE) -> None:
        await self._call(lambda: self._pause(mode))

    async def resume(self) -> None:
        """Raises `EngineFailure` while the weights are no whole version: after an update that broke off, or after their release."""
        await self._call(self._resume)

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        """See `Engine.update_weights`. Raises `WeightMismatch`, naming the tensors, if names, shapes or types do not fit."""
        if isinstance(update, GroupUpdate):
            update = update.at(self._member)
        return await self._call(lambda: self._update(update))

    @property
    def routed_experts(self) -> RoutedExperts | None:
        return None if self._decoder is None else self._decoder.routed_experts

    @property
    def weight_ranks(self) -> int:
        return 1

    async def join_weight_group(self, address: GroupAddress, first_rank: int, timeout_s: float) -> None:
        self._leave_weight_group()
        self._member = await asyncio.to_thread(join, address, first_rank, device=self._device, timeout_s=timeout_s)

    def _leave_weight_group(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Engine.logprobs`. Raises `EngineFailure` while the weights are no whole version."""
        return await self._call(lambda: self._logprobs(tokens_T))

    async def release_memory(self, *, weights: bool = True) -> None:
        await self._call(lambda: self._release(weights))

    async def resume_memory(self) -> None:
        await self._call(self._take_back)

    @property
    def version(self) -> int:
        return self._version

    def stats(self) -> Mapping[str, float]:
        decoder = self._decoder
        names = ("generated_tokens", "prefill_tokens", "decode_steps", "decode_s", "prefill_s", "running", "recordings")
        values = {name: float(getattr(decoder, name, 0)) for name in names}
        processed = values["generated_tokens"] + values["prefill_tokens"]
        return values | {"processed_tokens": processed, "waiting": float(len(decoder.waiting) if decoder is not None else 0)}

    async def check(self) -> None:
        self._live_thread()

    async def close(self) -> None:
        """Ends the thread and fails what is pending. Raises `DeadlineExceeded` if a forward pass does not end in a minute."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, CLOSE_DEADLINE_S)
        self._leave_weight_group()

    async def _call(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._command(command))

    def _command(self, command: Callable[[], T]) -> Future[T]:
        self._send_fresh()  # commands keep the order in which they were given
        return self._live_thread().call(command)

    def _send_fresh(self) -> None:
        """Submits the requests of this turn of the event loop together: a decoding step costs the same for one as for all."""
        fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        try:
            self._live_thread().call(lambda: self._submit(fresh))
        except EngineFailure as failure:
            for _, answer in fresh:
                answer.set_exception(failure)

    def _live_thread(self) -> DecodeThread:
        if self._thread is None:
            raise EngineFailure("the hf engine is used before start()")
        return self._thread

    # What follows runs in the decode thread.

    def _load(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if self._dtype not in _DTYPES:
            raise EngineFailure(f"dtype {self._dtype!r} is none of {', '.join(_DTYPES)}")
        device = torch.device(self._device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # of this thread: Triton's kernels run on the current one
        model = SlotModel(
            self._path,
            _DTYPES[self._dtype],
            device,
            slots=self._slots,
            max_tokens=self._max_tokens,
            exact=self._deterministic,
            record_routes=self._record_routes,
        )
        self._decoder = Decoder(model, self._path, self._version)

    def _loaded(self) -> Decoder:
        if self._decoder is None:
            raise EngineFailure("the hf engine has no model: start() did not finish")
        return self._decoder

    def _step(self) -> bool:
        decoder = self._decoder
        if decoder is None or self._paused or not decoder.has_work:
            return False
        self._deliver(decoder.step())
        return decoder.has_work

    def _submit(self, fresh: Sequence[tuple[GenerateRequest, Future[Generation]]]) -> None:
        for request, answer in fresh:
            if request.id in self._pending:
                message = f"request {request.id!r} is already in flight: ids must be unique among running requests"
                answer.set_exception(EngineFailure(message))
            else:
                self._pending[request.id] = answer  # all of them first: whatever breaks the thread below fails them too
        for request, answer in fresh:
            if self._pending.get(request.id) is answer:
                try:
                    self._loaded().submit(request)
                except (VerstError, OSError) as refused:
                    self._pending.pop(request.id).set_exception(refused)

    def _abort(self, ids: Sequence[str] | None) -> None:
        self._deliver(self._loaded().abort(ids))

    def _pause(self, mode: PauseMode) -> None:
        self._paused = True
        if mode is PauseMode.ABORT:
            self._abort(None)
        elif mode is PauseMode.RETRACT:
            self._loaded().retract()

    def _resume(self) -> None:
        self._require_memory("resume")
        if self._half_loaded is not None:
            raise EngineFailure(f"cannot resume: {self._half_loaded}; push the version again, whole")
        self._paused = False

    def _logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        self._require_memory("compute a probe")
        if self._half_loaded is not None:
            raise EngineFailure(f"no probe: {self._half_loaded}")
        return self._loaded().logprobs(tokens_T)

    def _release(self, weights: bool) -> None:
        if not self._paused:
            raise EngineFailure("the engine's memory is in use: pause() first")
        self._released = True
        if weights:
            self._half_loaded = "its weights were released"
        self._loaded().release_memory(weights=weights)

    def _take_back(self) -> None:
        self._loaded().resume_memory()
        self._released = False

    def _require_memory(self, what: str) -> None:
        if self._released:
            raise EngineFailure(f"cannot {what}: the engine's memory is released; resume_memory() first")

    def _update(self, update: WeightUpdate) -> Mapping[str, str]:
        version = update.manifest.version
        if not self._paused:
            raise EngineFailure(f"weights of version {version} came while decoding: pause() first")
        self._require_memory(f"load version {version}")
        self._loaded().check_manifest(update.manifest)
        self._half_loaded = f"the update to version {version} broke off"
        checksums = self._loaded().load_weights(update)
        self._half_loaded = None
        self._version = version
        return checksums

    def _deliver(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            self._pending.pop(generation.id).set_result(generation)

    def _fail_pending(self, failure: EngineFailure) -> None:
        for answer in self._pending.values():
            answer.set_exception(failure)
        self._pending.clear()
