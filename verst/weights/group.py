"""Weights through a process group of their own: trainer rank 0 broadcasts large buckets, every engine rank receives.

    sender     gather and copy bucket k+1 into one buffer     while bucket k is on the wire from the other
    receiver   load bucket k from one buffer                  while bucket k+1 arrives in the other

Both sides hold two buffers, whatever the model's size. A broadcast of 512 MiB runs at the speed of the link, one of 1 MiB at a
twenty-fifth of it (NCCL between two H200: 365 against 15 GB/s), hence buckets. NCCL carries CUDA tensors, gloo those of a CPU.

The group stands beside the trainer's own: it is made of a store and a backend, not by `init_process_group`, which a process can call once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from verst.errors import DeadlineExceeded, InvariantViolation
from verst.types import Manifest
from verst.weights.checksum import dtype_name, tensor_checksum
from verst.weights.layout import Layout, lay_out_buckets

BUCKET_BYTES = 512 << 20
SENDER = 0

_POLL_S = 0.00005
_GRACE_S = 1.0
"""gloo ends an operation at its limit by itself; NCCL's watchdog looks only now and then."""


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where a group meets. `name` is new for every group that meets there: after a member is lost, the others meet under another one."""

    host: str
    port: int
    name: str
    world: int


class WeightGroup:
    """One member. The constructor is a collective and returns when all `address.world` members are there; rank 0 is the sender.

    Raises `DeadlineExceeded` if not all came within `timeout_s`.
    """

    def __init__(self, store: Store, address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float) -> None:
        self.address, self.rank, self.device = address, rank, torch.device(device)
        limit = timedelta(seconds=timeout_s)
        prefixed = PrefixStore(address.name, store)
        try:
            self._backend: Any = self._make(prefixed, limit)
            self._meet(prefixed, limit)
        except RuntimeError as error:
            raise DeadlineExceeded(
                f"weight group {address.name}, rank {rank}: not all of {address.world} members met at {address.host}:{address.port} "
                f"within {timeout_s:g} s: {error}"
            ) from error

    def _make(self, store: Store, limit: timedelta) -> Any:
        rank, world = self.rank, self.address.world
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, rank, world, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, world, options)

    def _meet(self, store: Store, limit: timedelta) -> None:
        """NCCL connects at its first collective, which takes half a second: not within the first publish."""
        store.set(f"met/{self.rank}", "")
        store.wait([f"met/{rank}" for rank in range(self.address.world)], limit)
        deadline = time.monotonic() + limit.total_seconds()
        self.finish(self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device), deadline), deadline, "the first broadcast")

    def broadcast(self, buffer: torch.Tensor, deadline: float) -> Any:
        """Begins to send (rank 0) or to receive a buffer, until `deadline` on the monotonic clock; returns the work to `finish`."""
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        options.timeout = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        return self._backend.broadcast([buffer], options)

    def finish(self, work: Any, deadline: float, what: str) -> None:
        """Waits until the work is done. Raises `DeadlineExceeded`; the group cannot be used after that.

        By looking again and again: NCCL's own wait returns before the work is done, and gloo's knows no limit but that of its operation.
        """
        who = f"weight group {self.address.name}, rank {self.rank}: {what}"
        while not work.is_completed():
            if time.monotonic() > deadline + _GRACE_S:
                self.close()
                raise DeadlineExceeded(f"{who} was not done in time")
            time.sleep(_POLL_S)
        try:
            work.wait()  # raises what ended it
        except RuntimeError as error:
            raise DeadlineExceeded(f"{who} was not done in time, or a member is gone: {error}") from error

    def close(self) -> None:
        """Leaves the group without waiting for the others."""
        self._backend.abort()


def open_store(host: str, port: int = 0, *, timeout_s: float, listen: bool) -> TCPStore:
    """The store where a group meets; the sender's side listens, on a port of the system's choice if `port` is 0."""
    return TCPStore(host, port, None, listen, timedelta(seconds=timeout_s), wait_for_workers=False)


def join(address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float) -> WeightGroup:
    """Becomes a receiver. Raises `DeadlineExceeded` if not all members came within `timeout_s`."""
    return WeightGroup(
        open_store(address.host, address.port, timeout_s=timeout_s, listen=False), address, rank, device=device, timeout_s=timeout_s
    )


def send(
    group: WeightGroup, manifest: Manifest, tensors: Iterator[tuple[str, torch.Tensor]], *, bucket_bytes: int, deadline_s: float
) -> None:
    """Broadcasts one version. `tensors` are those of the manifest, in its order: `TrainBackend.weights()` gives them.

    Raises `InvariantViolation` if they are not, `DeadlineExceeded` naming the tensors that did not arrive.
    """
    deadline = time.monotonic() + deadline_s
    buckets = lay_out_buckets(manifest.entries, bucket_bytes)
    buffers = _buffers(buckets, group.device)
    under_way: list[tuple[Any, str]] = []
    for index, bucket in enumerate(buckets):
        if len(under_way) > 1:  # the buffer's former bucket has to be out first
            group.finish(*_first(under_way, deadline))
        buffer = buffers[index % 2][: bucket.nbytes]
        _fill(buffer, bucket, tensors)
        under_way.append((group.broadcast(buffer, deadline), f"version {manifest.version}: sending {bucket}"))
    for _ in range(len(under_way)):
        group.finish(*_first(under_way, deadline))
    extra = next(tensors, None)
    if extra is not None:
        raise InvariantViolation(f"version {manifest.version}: the trainer has a tensor {extra[0]} that the manifest does not name")


@dataclass(frozen=True, slots=True)
class GroupUpdate:
    """A version on its way to this member of a group."""

    manifest: Manifest
    group: WeightGroup
    bucket_bytes: int
    deadline_s: float

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer of a bucket; the buffer is used again once the next bucket's first tensor was taken.

        Raises `DeadlineExceeded` naming the tensors that did not arrive.
        """
        deadline = time.monotonic() + self.deadline_s
        buckets = lay_out_buckets(self.manifest.entries, self.bucket_bytes)
        arrivals = self._arrivals(buckets, deadline)
        try:
            for bucket, buffer in zip(buckets, arrivals, strict=True):
                yield from _views(buffer, bucket)
        finally:
            for _ in arrivals:  # who stops early still receives the rest: sender and other members count on it
                pass

    def _arrivals(self, buckets: Sequence[Layout], deadline: float) -> Iterator[torch.Tensor]:
        """The buffer of each bucket once it is there; the next one is under way by then."""
        buffers = _buffers(buckets, self.group.device)
        under_way: list[tuple[Any, str]] = []
        for index in range(len(buckets) + 1):
            if index < len(buckets):
                work = self.group.broadcast(buffers[index % 2][: buckets[index].nbytes], deadline)
                under_way.append((work, f"version {self.manifest.version}: receiving {buckets[index]}"))
            if index:
                self.group.finish(*_first(under_way, deadline))
                yield buffers[(index - 1) % 2]

    def checksum(self, tensor: torch.Tensor) -> str:
        return tensor_checksum(tensor)


def _first(under_way: list[tuple[Any, str]], deadline: float) -> tuple[Any, float, str]:
    work, what = under_way.pop(0)
    return work, deadline, what


def _buffers(buckets: Sequence[Layout], device: torch.device) -> list[torch.Tensor]:
    largest = max((bucket.nbytes for bucket in buckets), default=0)
    return [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(buckets)))]


def _fill(buffer: torch.Tensor, bucket: Layout, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    for entry, into in _slots(buffer, bucket):
        name, tensor = next(tensors, ("none", torch.empty(0)))
        found = (name, tuple(tensor.shape), dtype_name(tensor.dtype))
        if found != (entry.name, entry.shape, entry.dtype):
            raise InvariantViolation(f"the trainer's next tensor is {found}, the manifest says {(entry.name, entry.shape, entry.dtype)}")
        into.copy_(tensor, non_blocking=True)


def _views(buffer: torch.Tensor, bucket: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    for entry, view in _slots(buffer, bucket):
        yield entry.name, view


def _slots(buffer: torch.Tensor, bucket: Layout) -> Iterator[tuple[Any, torch.Tensor]]:
    for entry, start in zip(bucket.entries, bucket.offsets, strict=True):
        dtype = getattr(torch, entry.dtype)
        yield entry, buffer[start : start + entry.nbytes].view(dtype).view(entry.shape)
