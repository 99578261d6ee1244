"""What runs in a trainer rank's actor: a plain class that tests drive without Ray. Batches reach it encoded (`verst.journal.codec`)."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from verst import secrets
from verst.config.hub import with_local_model
from verst.config.schema import Config
from verst.errors import VerstError
from verst.observe.metrics import Tally
from verst.runtime.actors import is_actor
from verst.runtime.imports import large_imports
from verst.types import Estimates, Manifest, RoutedExperts, RoutesWanted

if TYPE_CHECKING:
    from torch import Tensor

    from verst.observe.outliers import Progress
    from verst.training.checkpoints import CheckpointWriter, FileRecord, LoadedState
    from verst.weights.group import GroupAddress, Member

P = ParamSpec("P")
T = TypeVar("T")

GROUP = "group"
"""In place of a location: the version is broadcast, not written."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version that can be brought to the engines. `probe_T`: the trainer's log-probabilities of the probe, if they are known already."""

    manifest: Manifest
    probe_T: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class TrainerFacts:
    """What is known of a rank once it has started."""

    num_updates: int  # of each step
    routed_experts: RoutedExperts | None
    routes_wanted: RoutesWanted | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What a rank learned from a batch before its first update (the picklable half of `BatchScores`)."""

    tally: Tally
    reference_kl: dict[int, float]
    values: dict[int, NDArray[np.float32]] = field(default_factory=dict)


def _collective(method: Callable[Concatenate[TrainerWorker, P], T]) -> Callable[Concatenate[TrainerWorker, P], T]:
    """A method in which ranks talk to one another: what it raises if they cannot is a diagnosis (`verst.training.distributed`)."""

    @functools.wraps(method)
    def checked(self: TrainerWorker, *args: P.args, **options: P.kwargs) -> T:
        from verst.training.distributed import collectives

        with collectives(f"trainer rank {self._rank}: {method.__name__}"):
            return method(self, *args, **options)

    return checked


def rank_worker(config: Config, rank: int, device: str) -> TrainerWorker:
    """A rank's worker in a process of its own, whose environment holds no secrets from here on: a user's loss and model run in it."""
    if is_actor():
        secrets.take(config.run.secrets)
    return TrainerWorker(config, rank, device)


class TrainerWorker:
    """One trainer rank: backend, publishing, checkpoint files and snapshots.

    A rank that outlives another one is told to `abandon` what it waits for and to `leave`; `start` then builds everything anew, in the same
    process and on the same device context.
    """

    def __init__(self, config: Config, rank: int, device: str) -> None:
        self._config = config
        self._rank = rank
        self._device = device
        self.backend: Any = None
        self._group: Member | None = None
        self._group_name = ""
        self._sending: tuple[str, int] | None = None  # by which group which version
        self._called_off: tuple[str, int] | None = None
        self._writers: dict[str, CheckpointWriter] = {}  # by directory

    async def ping(self) -> None:
        """Answers also while the rank works, as long as its process runs."""

    async def abandon(self) -> None:
        """Ends the collectives that this rank may be inside of, whose peers are lost. Beside its work, which fails then."""
        if "verst.training.distributed" in sys.modules:  # else it has not begun to start
            from verst.training.distributed import abort_distributed

            abort_distributed()

    def leave(self) -> None:
        """Gives up everything that `start` has made. The rank's work is over when this begins."""
        self._leave_group()
        self.backend = self._called_off = None
        if "torch" in sys.modules:
            import torch

            from verst.training.distributed import leave_distributed

            leave_distributed()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def rendezvous(self) -> str:
        """An address on this rank's machine where all ranks can meet."""
        from verst.training.distributed import Rendezvous

        self._rendezvous = Rendezvous()
        return self._rendezvous.address

    @_collective
    def start(self, rendezvous: str | None) -> TrainerFacts:
        """Loads the model; joins the other ranks if there are any."""
        with large_imports():
            from verst.training.backends import make_backend
            from verst.training.distributed import init_distributed

            with secrets.lent():  # the hub's library looks for its token in the environment
                self._config = with_local_model(self._config)
            world = self._config.train.ranks
            if rendezvous is not None:
                init_distributed(self._rank, world, rendezvous, timeout_s=self._config.train.deadline_s, device=self._device)
            self.backend = make_backend(self._config, rank=self._rank, world=world, device=self._device)
        return TrainerFacts(self.backend.num_updates, self.backend.routed_experts, self.backend.routes_wanted)

    @_collective
    def load_batch(self, encoded: bytes, routes: bytes | None) -> Scores:
        """`routes`: those that this rank wants, of the samples that it computes."""
        from verst.journal.codec import decode_batch, decode_routes

        batch = decode_batch(encoded)
        if routes is not None:
            known = decode_routes(routes)
            batch = replace(batch, samples=tuple(replace(s, routes=known.get(i)) for i, s in enumerate(batch.samples)))
        scores = self.backend.load_batch(batch)
        return Scores(scores.tally, dict(scores.reference_kl), dict(scores.values))

    async def progress(self) -> Progress:
        """How far the call is that this rank does now. Answered while it is done."""
        return self.backend.progress()

    @_collective
    def forward_backward(self, update: int, advantages: Estimates, returns: Sequence[NDArray[np.float32]] = ()) -> Tally:
        return self.backend.forward_backward(update, advantages, returns)

    @_collective
    def optimizer_step(self, update: int) -> Tally:
        return self.backend.optimizer_step(update)

    @_collective
    def publish(self, version: int, location: str | None, probe_T: NDArray[np.int32]) -> Published | None:
        """Hashes the weights and, given a location, writes them for the engines. Rank 0 returns what the engines need.

        A collective: every rank takes part in gathering the tensors. The call that reads the weights for the engines scores the probe,
        because their memory may be given up right after it: this one, if it writes a file, else `send`.
        """
        from verst.weights.files import describe, publish
        from verst.weights.location import remove_versions

        writes = bool(location) and location != GROUP
        weights = self.backend.weights()
        manifest: Manifest | None = None
        if self._rank:
            for _ in weights:
                pass
        elif location and writes:
            manifest = publish(version, weights, location)
            remove_versions(location, keep={version - 1, version})  # the one before may still be on its way into an engine
        else:
            manifest = replace(describe(version, weights), location=location or "")
        logprobs_T = self.backend.logprobs(probe_T) if writes else None
        return None if manifest is None else Published(manifest, logprobs_T)

    def host_group(self, name: str, world: int, shared: bool) -> GroupAddress:
        """Opens the place where weight groups meet, and names the first. Rank 0 only; `send` forms them."""
        from verst.training.distributed import own_address
        from verst.weights.group import GroupAddress, open_store

        host = "127.0.0.1" if shared else own_address()
        self._store = open_store(host, timeout_s=self._config.weights.deadline_s, listen=True)
        return GroupAddress(host, self._store.port, name, world, shared)

    def _join(self, address: GroupAddress) -> None:
        """Becomes the sender of a group, and leaves the former one. A collective with the replicas."""
        from verst.weights.group import SENDER, enter

        self._leave_group()
        limit_s, off = self._config.weights.deadline_s, lambda: self._called_off == self._sending
        self._group = enter(self._store, address, SENDER, device=self._device, timeout_s=limit_s, called_off=off)

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    @_collective
    def send(self, manifest: Manifest, probe_T: NDArray[np.int32], address: GroupAddress | None = None) -> NDArray[np.float32]:
        """Broadcasts the weights that `publish` described, before anything changes them, and scores the probe. A collective.

        `address`: of a group to form for it, and for the versions to come. In one call, so that no other call of the loop comes between.

        Raises `DeadlineExceeded` if the version did not reach the members of the group, and `InvariantViolation` if it is not what was
        described; all ranks have done their part of the collectives then, so that it can be sent again.
        """
        weights = self.backend.weights()
        failure: VerstError | None = None
        if not self._rank:
            try:
                self._send(manifest, weights, address)
            except VerstError as error:
                failure = error
        for _ in weights:  # by rank 0 too, after a failure: the others are in the same gathers
            pass
        logprobs_T = self.backend.logprobs(probe_T)
        if failure is not None:
            raise failure
        return logprobs_T

    def _send(self, manifest: Manifest, weights: Iterator[tuple[str, Tensor]], address: GroupAddress | None) -> None:
        from verst.weights.group import send
        from verst.weights.layout import BUCKET_BYTES

        if address is not None:
            self._group_name = address.name
        self._sending = self._group_name, manifest.version
        if address is not None:
            self._join(address)
        assert self._group is not None, "a version cannot come by a group that was never formed"
        send(self._group, manifest, weights, bucket_bytes=BUCKET_BYTES, deadline_s=self._config.weights.deadline_s)

    async def call_off(self, group: str, version: int) -> None:
        """Ends `send` of this version by this group, where it waits for its receivers, beside its work, or as soon as it begins."""
        self._called_off = group, version

    def release_memory(self, weights: bool) -> None:
        self.backend.release_memory(weights=weights)

    def resume_memory(self) -> None:
        self.backend.resume_memory()

    def snapshot(self, directory: str, step: int) -> dict[str, Any]:
        """Copies this rank's state and begins to write it there in the background. Returns the model's fingerprint."""
        from verst.training.checkpoints import CheckpointWriter, fingerprint

        state = self.backend.state()
        writer = self._writers[directory] = CheckpointWriter(Path(directory), step, rank=self._rank, world=self._config.train.ranks)
        writer.begin(state)
        return fingerprint(state)

    async def written(self, directory: str) -> FileRecord:
        """Waits for the file begun there by `snapshot`, while training goes on. Returns its record.

        Raises `CheckpointError` if it could not be written.
        """
        return await asyncio.to_thread(self._writers.pop(directory).finish)

    @_collective
    def restore(self, directory: str, step: int) -> None:
        """Takes this rank's part of a verified checkpoint."""
        from verst.training.checkpoints import load_state

        self._take(load_state(Path(directory), step, rank=self._rank, world=self._config.train.ranks), step)

    @_collective
    def restore_snapshot(self, directory: str, step: int) -> None:
        """Takes this rank's own state, from memory."""
        from verst.training.snapshots import load_snapshot

        self._take(load_snapshot(Path(directory), step, rank=self._rank, world=self._config.train.ranks), step)

    def _take(self, state: LoadedState, step: int) -> None:
        """The place in the schedule is that of this run's step."""
        self.backend.load_state(replace(state, values={**state.values, "update": step * self.backend.num_updates}))

    @_collective
    def export(self, directory: str) -> None:
        """Writes the current weights with config and tokenizer as a Hugging Face directory. A collective."""
        from verst.training.export import export_model

        weights = self.backend.weights()
        if self._rank:
            for _ in weights:
                pass
        else:
            export_model(self._config.model.path, {n: t.cpu().clone() for n, t in weights}, Path(directory))

    def close(self) -> None:
        from verst.training.distributed import leave_distributed

        leave_distributed()
