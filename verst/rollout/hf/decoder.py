"""Continuous batching: one step gives every running sequence a token and every free slot a waiting request.

A step is: decode the running rows, prefill the admitted prompts, sample all rows from the logits of both, free what has ended. It is
one unit to the outside: between two steps no logits are pending, so all tokens of a step come from the policy version of that moment.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from verst.errors import EngineFailure
from verst.protocols import WeightUpdate
from verst.rollout.hf.model import Passed, SlotModel
from verst.rollout.hf.prompts import HeldPrompts
from verst.rollout.hf.routes import SlotRoutes, on_host
from verst.rollout.hf.sampling import RowSampling, sample, uniforms
from verst.rollout.hf.slots import SlotTable
from verst.rollout.hf.stop_strings import StopStrings
from verst.rollout.hf.weights import check_manifest, load_weights
from verst.rollout.limits import check_request, check_tokens
from verst.types import FinishReason, GenerateRequest, Generation, Manifest


class Decoder:
    """Requests in, generations out, one `step` at a time. Not thread-safe."""

    def __init__(self, model: SlotModel, model_path: str, version: int) -> None:
        self.version = version
        self.waiting: deque[GenerateRequest] = deque()
        self.generated_tokens = self.prefill_tokens = self.decode_steps = 0
        self.decode_s = self.prefill_s = 0.0
        self._model, self._model_path = model, model_path
        self._table = SlotTable(model.rows, model.max_tokens)
        self._held = HeldPrompts(model.rows)
        self.routed_experts = None if model.tap is None else model.tap.kind
        self._routes = None if self.routed_experts is None else SlotRoutes(model.rows, model.max_tokens, self.routed_experts)
        self._copies: dict[int, tuple[int, int]] = {}  # target slot: source slot and length, of copies still to be made
        self._stop_ids = model.stop_ids()
        self._stop_strings: StopStrings | None = None
        self._sampling: RowSampling | None = None  # of the last step; None once a row came or moved
        self._retracted = False  # the running rows' keys and values are gone

    @property
    def running(self) -> int:
        return int(self._table.active_S.sum())

    @property
    def recordings(self) -> int:
        """Forward passes that are replayed as CUDA graphs."""
        return self._model.recordings

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or bool(self._table.active_S.any())

    def submit(self, request: GenerateRequest) -> None:
        """Queues a request. Raises `EngineFailure` if it cannot be served."""
        check_request(request, self._model.vocab_size, self._model.max_tokens)
        if request.sampling.stop and self._stop_strings is None:
            self._stop_strings = StopStrings(self._model_path)
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """One token for each running and each admitted sequence; returns the generations that ended with it."""
        started = time.perf_counter()
        if self._retracted:
            self._refill()
        logits = self._decode()
        prefill_started = time.perf_counter()
        admitted = self._admit()
        prefill_s = time.perf_counter() - prefill_started
        self._sample(self._merge(logits, admitted))
        finished = self._finish()
        self.prefill_s += prefill_s
        self.decode_s += time.perf_counter() - started - prefill_s
        return finished

    def abort(self, ids: Sequence[str] | None) -> list[Generation]:
        """Ends these requests (None: all) where they are."""
        chosen = None if ids is None else set(ids)
        ended: list[Generation] = []
        for slot, request in enumerate(self._table.requests):
            if request is not None and (chosen is None or request.id in chosen):
                ended.append(self._end(slot, FinishReason.ABORT))
        kept: deque[GenerateRequest] = deque()
        for request in self.waiting:
            if chosen is None or request.id in chosen:
                ended.append(_nothing_generated(request))
            else:
                kept.append(request)
        self.waiting = kept
        return ended

    def in_flight(self) -> list[Generation]:
        """What each running sequence has so far, as if it were aborted."""
        return [self._generation(int(slot), FinishReason.ABORT) for slot in np.flatnonzero(self._table.active_S)]

    def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability `[T]` of each token given those before it, at temperature 1; entry 0 is 0."""
        check_tokens("the probe", tokens_T, self._model.vocab_size, self._model.max_tokens)
        return self._model.logprobs(tokens_T)

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises `WeightMismatch` if a version does not fit the model."""
        check_manifest(self._model.model, manifest)

    def load_weights(self, update: WeightUpdate) -> dict[str, str]:
        """Loads a version; from the next step on tokens carry it. Running sequences keep their older keys and values."""
        self._held.clear()
        checksums = load_weights(self._model.model, update)
        self.version = update.manifest.version
        return checksums

    def retract(self) -> None:
        """The keys and values of running sequences are computed again when decoding goes on, by the weights of then."""
        self._held.clear()
        self._retracted = True

    def release_memory(self, *, weights: bool) -> None:
        """Gives up keys and values, and with `weights` the parameters. Running sequences are retracted."""
        self.retract()
        self._model.release_memory(weights=weights)

    def resume_memory(self) -> None:
        self._model.resume_memory()

    def _refill(self) -> None:
        """Computes the keys and values of running sequences anew, but for the newest token's, which the next step computes.

        The routes of this pass are dropped: its tokens led to the next ones on those that are known.
        """
        table = self._table
        for slot, request in enumerate(table.requests):
            if request is not None:
                tokens_T = np.concatenate((request.tokens_T, table.tokens_ST[slot, : table.generated_S[slot] - 1]))
                self._model.prefill(tokens_T, slot)
                self.prefill_tokens += len(tokens_T)
        self._retracted = False

    def _decode(self) -> torch.Tensor | None:
        """Logits `[rows, V]` after the newest token of each running row."""
        table = self._table
        if not table.active_S.any():
            return None
        if not self._model.exact:
            self._close_gaps()
        rows = self._model.rows_for(int(np.flatnonzero(table.active_S)[-1]) + 1)
        self.decode_steps += 1
        # The newest token is not in the cache yet: that is what this step is for.
        passed = self._model.decode(table.newest_S[:rows], table.length_S[:rows] - 1, table.active_S[:rows])
        if self._routes is not None and passed.experts_NLK is not None:
            active = np.flatnonzero(table.active_S)
            self._routes.expect(active, table.generated_S[active] - 1, passed.experts_NLK)
        return passed.logits

    def _close_gaps(self) -> None:
        """Moves the last sequences into free slots below, as nobody waits to fill them."""
        if self.waiting:
            return
        table, count = self._table, self.running
        targets = [int(slot) for slot in np.flatnonzero(~table.active_S[:count])]
        sources = [int(slot) + count for slot in np.flatnonzero(table.active_S[count:])]
        if not sources:
            return
        self._model.cache.copy(sources, targets, int(table.length_S[sources].max()))
        for source, target in zip(sources, targets, strict=True):
            if self._routes is not None:
                self._routes.move(source, target, int(table.generated_S[source]))
            table.move(source, target)
            self._held.move(source, target)
        self._sampling = None

    def _admit(self) -> dict[int, torch.Tensor]:
        """Fills free slots with waiting requests in order of arrival; returns the logits `[V]` that follow each prompt, by slot."""
        admitted: dict[int, torch.Tensor] = {}
        free = [int(slot) for slot in np.flatnonzero(~self._table.active_S[: self._model.slots])] if self.waiting else []
        while free and self.waiting:
            request = self.waiting.popleft()
            prompt = request.tokens_T.tobytes()
            slot = next((slot for slot in free if self._held.holds(slot, prompt)), free[0])
            free.remove(slot)
            admitted[slot], experts_PLK = self._fill(slot, request, prompt)
            if self._routes is not None and experts_PLK is not None:
                self._routes.admit(slot, experts_PLK)
            self._table.admit(slot, request, (*self._stop_ids, *request.sampling.stop_token_ids))
            self._sampling = None
        self._copy_prompts()
        return admitted

    def _fill(self, slot: int, request: GenerateRequest, prompt: bytes) -> Passed:
        """Brings the prompt into the slot: it may be there, or will be copied from a slot that holds it, or is computed."""
        found = self._held.find(prompt)
        if found is None:
            if any(source == slot for source, _ in self._copies.values()):
                self._copy_prompts()  # before the prefill overwrites what they read
            logits, experts_PLK = self._model.prefill(request.tokens_T, slot)
            passed = Passed(logits, None if experts_PLK is None else on_host(experts_PLK))
            self.prefill_tokens += len(request.tokens_T)
        else:
            source, passed = found
            if source != slot and not self._held.holds(slot, prompt):
                self._copies[slot] = (self._copies[source][0] if source in self._copies else source, len(request.tokens_T))
        self._held.put(slot, prompt, passed)
        return passed

    def _copy_prompts(self) -> None:
        """Makes the copies noted so far, together: one by one their launches would take longer than the decoding."""
        if self._copies:
            sources, lengths = zip(*self._copies.values(), strict=True)
            self._model.cache.copy(sources, list(self._copies), max(lengths))
            self._copies.clear()

    def _merge(self, decoded: torch.Tensor | None, admitted: dict[int, torch.Tensor]) -> torch.Tensor:
        """Logits `[rows, V]` of decoded and admitted rows together."""
        if not admitted and decoded is not None:
            return decoded
        known = 0 if decoded is None else len(decoded)
        rows = self._table.slots if self._model.exact else max(known, max(admitted) + 1)
        any_logits = next(iter(admitted.values()))
        merged = any_logits.new_zeros(rows, len(any_logits))
        if decoded is not None:
            merged[:known] = decoded
        merged[torch.tensor(list(admitted), device=merged.device)] = torch.stack(list(admitted.values()))
        return merged

    def _sample(self, logits: torch.Tensor) -> None:
        table, rows = self._table, len(logits)
        if self._sampling is None or len(self._sampling.greedy) != rows:
            self._sampling = RowSampling.of(
                table.temperature_S[:rows], table.top_p_S[:rows], table.top_k_S[:rows], table.min_p_S[:rows], logits.device
            )
        drawn = torch.from_numpy(uniforms(table.seed_S[:rows], table.length_S[:rows])).to(logits.device, non_blocking=True)
        tokens, logprobs = sample(logits, self._sampling, drawn)
        # One transfer, the only wait for the device in a step; float64 holds both exactly.
        both = torch.stack((tokens.double(), logprobs.double())).cpu().numpy()
        if self._routes is not None:
            self._routes.settle()
        active = np.flatnonzero(table.active_S)
        if not np.isfinite(both[1, active]).all():
            raise EngineFailure(f"the logits of policy version {self.version} are not finite")
        table.record(active, both[0, active].astype(np.int64), both[1, active].astype(np.float32), self.version)
        self.generated_tokens += len(active)

    def _finish(self) -> list[Generation]:
        table = self._table
        active = np.flatnonzero(table.active_S)
        stopped = table.stopped(active)
        for index in np.flatnonzero(table.has_stop_strings_S[active] & ~stopped):
            stopped[index] = self._stop_string_ended(int(active[index]))
        full = table.length_S[active] >= table.limit_S[active]
        return [
            self._end(int(active[index]), FinishReason.STOP if stopped[index] else FinishReason.LENGTH)
            for index in np.flatnonzero(stopped | full)
        ]

    def _end(self, slot: int, reason: FinishReason) -> Generation:
        """Frees the slot; returns what it generated."""
        generation = self._generation(slot, reason)
        self._table.free(slot)
        if self._routes is not None:
            self._routes.free(slot)
        return generation

    def _generation(self, slot: int, reason: FinishReason) -> Generation:
        """What the slot has generated, with the routes that were asked for."""
        request = self._table.requests[slot]
        assert request is not None
        generation = self._table.generation(slot, reason)
        if self._routes is None or request.routes_from is None:
            return generation
        return replace(generation, experts_RLK=self._routes.rows(slot, len(generation.tokens_T), request.routes_from))

    def _stop_string_ended(self, slot: int) -> bool:
        request = self._table.requests[slot]
        assert request is not None
        assert self._stop_strings is not None
        return self._stop_strings.end(self._table.tokens_ST[slot, : self._table.generated_S[slot]], request.sampling.stop)


def _nothing_generated(request: GenerateRequest) -> Generation:
    return Generation(request.id, np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), FinishReason.ABORT)
