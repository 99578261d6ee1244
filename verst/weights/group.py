"""Weights through a process group of their own: trainer rank 0 broadcasts large buckets, every engine rank receives.

    sender     gather and copy bucket k+1 into one buffer     while bucket k is on the wire from the other
    receiver   load bucket k from one buffer                  while bucket k+1 arrives in the other

Both sides hold two buffers, whatever the model's size. A broadcast of 512 MiB runs at the speed of the link, one of 1 MiB at a
twenty-fifth of it (NCCL between two H200: 365 against 15 GB/s), hence buckets. NCCL carries CUDA tensors, gloo those of a CPU.

The group stands beside the trainer's own: it is made of a store and a backend, not by `init_process_group`, which a process can call once.
Where trainer and engine share one GPU, NCCL cannot connect them; they use `verst.weights.shared` in its place, by the same methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from verst.errors import DeadlineExceeded, InvariantViolation
from verst.types import Manifest
from verst.weights.checksum import dtype_name, tensor_checksum
from verst.weights.layout import Form, Layout, lay_out_buckets

SENDER = 0

MEETING_S = 60.0
"""How long members wait for one another once the sender is there: all of them run, and were called together."""

_POLL_S = 0.00005
_MEETING_POLL_S = 0.002
_GRACE_S = 1.0
"""gloo ends an operation at its limit by itself; NCCL's watchdog looks only now and then."""


CalledOff = Callable[[], bool]
"""Asked by the sender while it waits: whether others know that a receiver has failed. Then it leaves with `DeadlineExceeded`."""


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where a group meets. `name` is new for every group that meets there: after a member is lost, the others meet under another one.

    `shared`: the members map the sender's buffers (`verst.weights.shared`) in place of receiving copies of them.
    """

    host: str
    port: int
    name: str
    world: int
    shared: bool = False


class Member(Protocol):
    """One end of a group; rank 0 is the sender."""

    @property
    def rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def views(self) -> dict[tuple[int, Form], list[torch.Tensor]]:
        """The tensors in each buffer, by its address and form: kept, because making them anew takes longer than their transfer."""
        ...

    def buffers(self, nbytes: int, count: int, deadline: float) -> list[torch.Tensor]:
        """Buffers to broadcast from, or to receive into. Raises `DeadlineExceeded` if they need the sender, and it has not made them."""
        ...

    def broadcast(self, buffer: torch.Tensor, deadline: float) -> Any:
        """Begins to send (rank 0) or to receive a buffer, until `deadline` on the monotonic clock; returns the work to `finish`."""
        ...

    def finish(self, work: Any, deadline: float, what: str) -> None:
        """Waits until the work is done. Raises `DeadlineExceeded`; the group cannot be used after that."""
        ...

    def release(self, work: Any) -> None:
        """A receiver does not need the buffer of this work any more."""
        ...

    def close(self) -> None:
        """Leaves the group without waiting for the others."""
        ...


class WeightGroup:
    """One member. The constructor is a collective and returns when all `address.world` members are there; rank 0 is the sender.

    Raises `DeadlineExceeded` if not all came in time (`meet`).
    """

    def __init__(
        self, store: Store, address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float, called_off: CalledOff = never
    ) -> None:
        self.address, self.rank, self.device, self._called_off = address, rank, torch.device(device), called_off
        self._buffers: list[torch.Tensor] = []
        self.views: dict[tuple[int, Form], list[torch.Tensor]] = {}
        prefixed = PrefixStore(address.name, store)
        deadline = meet(prefixed, address, rank, timeout_s, called_off)
        try:
            self._backend: Any = self._make(prefixed, deadline, timeout_s)
            # NCCL connects at its first collective, which takes half a second: not within the first publish
            first = self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device), deadline)
        except RuntimeError as error:
            raise DeadlineExceeded(f"{_missed(address, rank)}, or one is gone: {error}") from error
        self.finish(first, deadline, "the first broadcast")

    def _make(self, store: Store, deadline: float, timeout_s: float) -> Any:
        rank, world = self.rank, self.address.world
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, rank, world, _until(deadline))  # connects here; each operation brings its own limit
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)  # of every operation
        return dist.ProcessGroupNCCL(store, rank, world, options)

    def buffers(self, nbytes: int, count: int, deadline: float) -> list[torch.Tensor]:
        """Kept for the next version, whose tensors have the same sizes."""
        if len(self._buffers) < count or any(buffer.nbytes < nbytes for buffer in self._buffers):
            self.views.clear()
            self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(count)]
        return self._buffers

    def broadcast(self, buffer: torch.Tensor, deadline: float) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        options.timeout = _until(deadline)
        return self._backend.broadcast([buffer], options)

    def finish(self, work: Any, deadline: float, what: str) -> None:
        """By looking again and again: NCCL's own wait returns before the work is done, gloo's knows no limit but its operation's."""
        who = f"weight group {self.address.name}, rank {self.rank}: {what}"
        while not work.is_completed():
            if time.monotonic() > deadline + _GRACE_S:
                self.close()
                raise DeadlineExceeded(f"{who} was not done in time")
            if self._called_off():
                self.close()
                raise DeadlineExceeded(f"{who} was called off: a receiver has failed")
            time.sleep(_POLL_S)
        try:
            work.wait()  # raises what ended it
        except RuntimeError as error:
            raise DeadlineExceeded(f"{who} was not done in time, or a member is gone: {error}") from error

    def release(self, work: Any) -> None:
        """Nobody waits for it: each member has buffers of its own."""

    def close(self) -> None:
        self._backend.abort()


def open_store(host: str, port: int = 0, *, timeout_s: float, listen: bool) -> TCPStore:
    """The store where a group meets; the sender's side listens, on a port of the system's choice if `port` is 0."""
    return TCPStore(host, port, None, listen, timedelta(seconds=timeout_s), wait_for_workers=False)


def meet(store: Store, address: GroupAddress, rank: int, timeout_s: float, called_off: CalledOff = never) -> float:
    """Waits for all members at a group's store, and returns the deadline, on the monotonic clock, of what is left to connect.

    The sender may be in the middle of training, so receivers wait `timeout_s` for it; for the others all wait `MEETING_S`, if that is less.

    Raises `DeadlineExceeded`.
    """
    deadline = time.monotonic() + timeout_s
    waited_s = timeout_s
    try:
        store.set(f"met/{rank}", "")
        if rank != SENDER:
            store.wait([f"met/{SENDER}"], _until(deadline))
        waited_s = min(MEETING_S, max(deadline - time.monotonic(), 0.001))
        deadline = time.monotonic() + waited_s
        members = [f"met/{member}" for member in range(address.world)]
        while rank == SENDER and not store.check(members) and time.monotonic() < deadline:
            if called_off():
                raise DeadlineExceeded(f"{_missed(address, rank)}: called off, one has failed")
            time.sleep(_MEETING_POLL_S)
        store.wait(members, _until(deadline))
    except RuntimeError as error:
        raise DeadlineExceeded(f"{_missed(address, rank)} within {waited_s:.3g} s: {error}") from error
    return deadline


def _missed(address: GroupAddress, rank: int) -> str:
    return f"weight group {address.name}, rank {rank}: not all of {address.world} members met at {address.host}:{address.port}"


def _until(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def enter(
    store: Store, address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float, called_off: CalledOff = never
) -> Member:
    """Becomes a member, by a store that is open. A collective; raises `DeadlineExceeded` if not all members came in time (`meet`)."""
    from verst.weights.shared import SharedBuffers

    kind = SharedBuffers if address.shared else WeightGroup
    return kind(store, address, rank, device=device, timeout_s=timeout_s, called_off=called_off)


def join(address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float) -> Member:
    """Becomes a receiver: `enter` with a store of its own."""
    try:
        store = open_store(address.host, address.port, timeout_s=timeout_s, listen=False)
    except RuntimeError as error:
        raise DeadlineExceeded(
            f"weight group {address.name}, rank {rank}: nobody answered at {address.host}:{address.port} within {timeout_s:g} s: {error}"
        ) from error
    return enter(store, address, rank, device=device, timeout_s=timeout_s)


def send(group: Member, manifest: Manifest, tensors: Iterator[tuple[str, torch.Tensor]], *, bucket_bytes: int, deadline_s: float) -> None:
    """Broadcasts one version. `tensors` are those of the manifest, in its order: `TrainBackend.weights()` gives them.

    Raises `InvariantViolation` if they are not, `DeadlineExceeded` naming the tensors that did not arrive.
    """
    deadline = time.monotonic() + deadline_s
    buckets = lay_out_buckets(manifest.entries, bucket_bytes)
    buffers = _buffers(buckets, group, deadline)
    under_way: list[tuple[Any, str]] = []
    for index, bucket in enumerate(buckets):
        if len(under_way) > 1:  # the buffer's former bucket has to be out first
            group.finish(*_first(under_way, deadline))
        buffer = buffers[index % 2][: bucket.nbytes]
        _fill(_slots(group, buffer, bucket), bucket, tensors)
        under_way.append((group.broadcast(buffer, deadline), f"version {manifest.version}: sending {bucket}"))
    for _ in range(len(under_way)):
        group.finish(*_first(under_way, deadline))
    extra = next(tensors, None)
    if extra is not None:
        raise InvariantViolation(f"version {manifest.version}: the trainer has a tensor {extra[0]} that the manifest does not name")


@dataclass(frozen=True, slots=True)
class GroupUpdate:
    """A version on its way to the members of a group. It pickles without its `member`; who receives it puts itself there (`at`)."""

    manifest: Manifest
    bucket_bytes: int
    deadline_s: float
    member: Member | None = None

    def at(self, member: Member | None) -> GroupUpdate:
        """The same update, for this member to receive. Raises `InvariantViolation` for None: it has not joined the group."""
        if member is None:
            raise InvariantViolation(f"version {self.manifest.version} comes by a group that was not joined: join_weight_group() first")
        return replace(self, member=member)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into the buffer of a bucket; the buffer is used again once the next bucket's first tensor was taken."""
        for bucket in self.buckets():
            yield from bucket

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The tensors of each bucket, as views into its buffer, which is used again once the next bucket was taken.

        Raises `DeadlineExceeded` naming the tensors that did not arrive.
        """
        deadline = time.monotonic() + self.deadline_s
        buckets = lay_out_buckets(self.manifest.entries, self.bucket_bytes)
        member = self.member
        assert member is not None, "at() comes first"
        arrivals = self._arrivals(member, buckets, deadline)
        try:
            for bucket, buffer in zip(buckets, arrivals, strict=True):
                views = _slots(member, buffer, bucket)
                yield [(entry.name, view) for entry, view in zip(bucket.entries, views, strict=True)]
        finally:
            for _ in arrivals:  # who stops early still receives the rest: sender and other members count on it
                pass

    def _arrivals(self, member: Member, buckets: Sequence[Layout], deadline: float) -> Iterator[torch.Tensor]:
        """The buffer of each bucket once it is there; the next one is under way by then."""
        buffers = _buffers(buckets, member, deadline)
        under_way: list[tuple[Any, str]] = []
        for index in range(len(buckets) + 1):
            if index < len(buckets):
                work = member.broadcast(buffers[index % 2][: buckets[index].nbytes], deadline)
                under_way.append((work, f"version {self.manifest.version}: receiving {buckets[index]}"))
            if index:
                work = under_way[0][0]
                member.finish(*_first(under_way, deadline))
                yield buffers[(index - 1) % 2]
                member.release(work)

    def checksum(self, tensor: torch.Tensor) -> str:
        return tensor_checksum(tensor)


def _first(under_way: list[tuple[Any, str]], deadline: float) -> tuple[Any, float, str]:
    work, what = under_way.pop(0)
    return work, deadline, what


def _buffers(buckets: Sequence[Layout], member: Member, deadline: float) -> list[torch.Tensor]:
    return member.buffers(max((bucket.nbytes for bucket in buckets), default=0), min(2, len(buckets)), deadline)


def _fill(slots: list[torch.Tensor], bucket: Layout, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    given = []
    for entry in bucket.entries:
        name, tensor = next(tensors, ("none", torch.empty(0)))
        if (name, tensor.shape, dtype_name(tensor.dtype)) != (entry.name, entry.shape, entry.dtype):
            found = (name, tuple(tensor.shape), dtype_name(tensor.dtype))
            raise InvariantViolation(f"the trainer's next tensor is {found}, the manifest says {(entry.name, entry.shape, entry.dtype)}")
        given.append(tensor)
    if given:
        torch._foreach_copy_(slots, given)  # pyright: ignore[reportPrivateImportUsage] - it has no public name


def _slots(member: Member, buffer: torch.Tensor, bucket: Layout) -> list[torch.Tensor]:
    """The bucket's tensors, as views into a buffer of this member."""
    key = (buffer.data_ptr(), bucket.form)
    if key not in member.views:
        starts = zip(bucket.entries, bucket.offsets, strict=True)
        member.views[key] = [
            buffer[start : start + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape) for entry, start in starts
        ]
    return member.views[key]
