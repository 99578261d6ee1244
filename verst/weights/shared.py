"""Buckets that the receivers map instead of receiving: CUDA memory of one device (CUDA IPC), on a CPU shared memory.

Trainer and engine that share a GPU cannot be two ranks of an NCCL group. Here the sender owns two buffers, the receivers read them where
they are, and a store carries who is done with what:

    sender     fill buffer k % 2, `written/k`     once every receiver has set `read/k-2`
    receiver   wait for `written/k`, load, `read/k`

A sender that leaves sets `left`: its receivers would wait until their own limits.

The methods are those of `verst.weights.group.WeightGroup`, and `send` and `GroupUpdate` work over both.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from verst.errors import DeadlineExceeded
from verst.weights.group import SENDER, CalledOff, GroupAddress, meet, never
from verst.weights.layout import Form
from verst.weights.location import shared_memory

_POLL_S = 0.00005
_LEFT = "left"
_LOOK = 200
"""After so many polls it is asked again whether the sender has left, which takes as long as a poll."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One use of a buffer: written by the sender, read by the receivers. They count alike, so it has the same number for all."""

    number: int

    @property
    def written(self) -> str:
        return f"written/{self.number}"

    def read(self, rank: int) -> str:
        return f"read/{self.number}/{rank}"


class SharedBuffers:
    """One member on the sender's host and device. Raises `DeadlineExceeded` if not all members came in time (`meet`)."""

    def __init__(
        self, store: Store, address: GroupAddress, rank: int, *, device: torch.device | str, timeout_s: float, called_off: CalledOff = never
    ) -> None:
        self.address, self.rank, self.device, self._called_off = address, rank, torch.device(device), called_off
        self._store = PrefixStore(address.name, store)
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self.views: dict[tuple[int, Form], list[torch.Tensor]] = {}
        self._unmapped: list[_Owned] = []
        self._turns = 0
        meet(self._store, address, rank, timeout_s, called_off)

    def buffers(self, nbytes: int, count: int, deadline: float) -> list[torch.Tensor]:
        """The sender's, here or mapped; made at their first use and kept, because each version needs them again.

        Raises `DeadlineExceeded` if the sender has not made them in time.
        """
        key = f"buffers/{count}/{nbytes}"
        if key not in self._buffers:
            self.views.clear()
            if self.rank == SENDER:
                made = [_Owned(nbytes, self.device) for _ in range(count)]
                for rank in self._receivers:
                    self._store.set(f"{key}/{rank}", json.dumps([owned.handle() for owned in made]))
                self._unmapped = made
                self._buffers = {key: [owned.buffer for owned in made]}
            else:
                mine = f"{key}/{self.rank}"
                self._wait_for([mine], deadline, f"the sender has not made {count} buffers of {nbytes} bytes in time")
                handles = json.loads(self._store.get(mine))
                self._buffers = {key: [_map(handle, nbytes, self.device) for handle in handles]}
        return self._buffers[key]

    def broadcast(self, buffer: torch.Tensor, deadline: float) -> Turn:
        """Begins a turn. The sender has filled the buffer."""
        turn = Turn(self._turns)
        self._turns += 1
        if self.rank == SENDER:
            self._synchronize()  # what lies on a stream is not yet in memory
            self._store.set(turn.written, "")
        return turn

    def finish(self, work: Turn, deadline: float, what: str) -> None:
        """The sender waits until all receivers are done with the buffer, a receiver until it is written. Raises `DeadlineExceeded`."""
        reads = [work.read(rank) for rank in self._receivers]
        keys = reads if self.rank == SENDER else [work.written]
        who = f"weight group {self.address.name}, rank {self.rank}: {what}"
        for polls in itertools.count():
            if self._store.check(keys):
                break
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{who} was not done in time")
            if self._called_off():
                raise DeadlineExceeded(f"{who} was called off: a receiver has failed")
            if polls % _LOOK == _LOOK - 1 and self._store.check([_LEFT]):
                raise DeadlineExceeded(f"{who} was not done, and the sender has left")
            time.sleep(_POLL_S)
        if self.rank == SENDER:
            for key in (work.written, *reads):
                self._store.delete_key(key)
            while self._unmapped:  # who has read one buffer has mapped all
                self._unmapped.pop().mapped()

    def release(self, work: Turn) -> None:
        self._synchronize()  # copies out of the buffer may still run
        self._store.set(work.read(self.rank), "")

    def close(self) -> None:
        if self.rank == SENDER:
            self._store.set(_LEFT, "")
        self._buffers.clear()
        while self._unmapped:
            self._unmapped.pop().mapped()

    @property
    def _receivers(self) -> list[int]:
        return [rank for rank in range(self.address.world) if rank != SENDER]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _wait_for(self, keys: list[str], deadline: float, what: str) -> None:
        try:
            self._store.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            address = self.address
            raise DeadlineExceeded(f"weight group {address.name} at {address.host}:{address.port}, rank {self.rank}: {what}") from error


class _Owned:
    """A buffer of the sender that others map."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._file: Path | None = None
        if device.type == "cpu":
            with tempfile.NamedTemporaryFile(prefix=".verst-bucket-", dir=shared_memory(), delete=False) as file:
                file.truncate(max(nbytes, 1))
            self._file = Path(file.name)
            self.buffer = _from_file(file.name, nbytes)
        else:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def handle(self) -> list[str | int | bool]:
        """What one other process needs to map it, as JSON."""
        if self._file is not None:
            return [str(self._file)]
        return [part.hex() if isinstance(part, bytes) else part for part in self.buffer.untyped_storage()._share_cuda_()]

    def mapped(self) -> None:
        """All have mapped it: its name is not needed any more, and nothing is left behind if a process is killed."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _map(handle: list[str | int | bool], nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return _from_file(str(handle[0]), nbytes)
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in handle]
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,))  # type: ignore[call-overload]


def _from_file(name: str, nbytes: int) -> torch.Tensor:
    return torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
