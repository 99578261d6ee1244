"""Device memory given up for others on the device and taken back, below the tensors that lie in it.

A tensor is a view of a storage. Only the bytes of storages go and come: the tensors stay the same objects, so whatever looks into them
(other views, Megatron's flat buffers, the shards of FSDP2, the state of an optimizer) is right again afterwards. What is kept lies in host
memory meanwhile, bit for bit.

Nothing may touch a tensor whose memory is given up: PyTorch does not notice, it reads whatever lies there, or the process dies. Who lends
memory out has to refuse the calls that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from verst.errors import ConfigError, InvariantViolation

_PIECE_BYTES = 256 << 20
"""Pinned memory is given out in powers of two: of one large piece up to half would lie idle."""


class Offload:
    """The memory of one set of storages on one device: here, or given up. The host's buffers are kept for the next time."""

    def __init__(self, device: torch.device, piece_bytes: int = _PIECE_BYTES) -> None:
        self._device = device
        self._host = _HostMemory(pinned=device.type == "cuda", piece_bytes=piece_bytes)
        self._kept: list[tuple[torch.UntypedStorage, int]] = []
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def is_away(self) -> bool:
        return bool(self._kept or self._dropped)

    def release(self, kept: Iterable[torch.Tensor] = (), dropped: Iterable[torch.Tensor] = (), but: Iterable[torch.Tensor] = ()) -> None:
        """Gives up the memory below `kept`, which comes back as it was, and below `dropped`, which comes back as zeros.

        What lies on another device, or in the same memory as a tensor of `but`, stays. Raises `InvariantViolation` if some of it is given
        up already or cannot be, `ConfigError` if the host has no room for what is kept; nothing has happened then.
        """
        if self.is_away:
            raise InvariantViolation("this memory is given up already: it has to be taken back before it can be given up again")
        spared = {_key(tensor) for tensor in but}
        keep = self._storages(kept, spared)
        drop = self._storages(dropped, spared | keep.keys())
        sizes = [storage.nbytes() for storage in keep.values()]
        self._host.reserve(sum(sizes))
        sources = [_bytes(storage) for storage in keep.values()]
        for which, start, part in self._host.runs(sizes):
            part.copy_(sources[which][start : start + len(part)], non_blocking=True)
        _wait(self._device)
        self._kept = list(zip(keep.values(), sizes, strict=True))
        self._dropped = [(storage, storage.nbytes()) for storage in drop.values()]
        for storage, _ in (*self._kept, *self._dropped):
            storage.resize_(0)
        return_unused(self._device)

    def take_back(self) -> None:
        """Takes the memory back, if it is given up. Raises `ConfigError` if the device has no room for it: others hold too much of it."""
        try:
            for storage, size in (*self._kept, *self._dropped):
                storage.resize_(size)
        except torch.OutOfMemoryError as error:
            needed = sum(size for _, size in (*self._kept, *self._dropped))
            raise ConfigError(
                f"the device has no room for {needed / 2**30:.1f} GiB that were given up for others on it, who hold too much: use a "
                f"smaller rollout.max_running or train.microbatch_tokens, or GPUs for trainer and replicas of their own ({error})"
            ) from error
        targets = [_bytes(storage) for storage, _ in self._kept]
        for which, start, part in self._host.runs([size for _, size in self._kept]):
            targets[which][start : start + len(part)].copy_(part, non_blocking=True)
        for storage, _ in self._dropped:
            _bytes(storage).zero_()
        _wait(self._device)
        self._kept, self._dropped = [], []

    def _storages(self, tensors: Iterable[torch.Tensor], spared: Iterable[int]) -> dict[int, torch.UntypedStorage]:
        """The distinct storages of these tensors on the device."""
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            key = _key(tensor)
            if tensor.device.type != self._device.type or key in spared or not tensor.numel():
                continue
            storage = tensor.untyped_storage()
            if not storage.nbytes() or not storage.resizable():
                state = "given up already" if not storage.nbytes() else "part of a mapped file or owned by another library"
                raise InvariantViolation(f"the memory of a tensor {tuple(tensor.shape)} cannot be given up: it is {state}")
            found[key] = storage
        return found


class _HostMemory:
    """Bytes of the host in pieces, used from the first to the last."""

    def __init__(self, *, pinned: bool, piece_bytes: int) -> None:
        self._pinned, self._piece_bytes = pinned, piece_bytes
        self._pieces: list[torch.Tensor] = []

    def reserve(self, size: int) -> None:
        missing = size - sum(len(piece) for piece in self._pieces)
        try:
            while missing > 0:
                count = min(self._piece_bytes, 1 << (missing - 1).bit_length())
                self._pieces.append(torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned))
                missing -= count
        except RuntimeError as error:  # of the allocator, or of the driver that pins
            raise ConfigError(
                f"the host has no room for {size / 2**30:.1f} GiB that a GPU shared by trainer and replicas has to hand over: give the "
                f"process more (pinned) memory, or trainer and replicas GPUs of their own ({error})"
            ) from error

    def runs(self, sizes: Sequence[int]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Where things of these sizes lie, one behind the other: which of them, from which byte of it, in which bytes of the host."""
        pieces = iter(self._pieces)
        rest = torch.empty(0, dtype=torch.uint8)
        for which, size in enumerate(sizes):
            start = 0
            while start < size:
                if not len(rest):
                    rest = next(pieces)
                part, rest = rest[: size - start], rest[size - start :]
                yield which, start, part
                start += len(part)


def own_memory(module: torch.nn.Module) -> None:
    """Gives each parameter memory of its own where it is part of a mapped file, which cannot be given up and taken back."""
    for parameter in module.parameters():
        if not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


def return_unused(device: torch.device) -> None:
    """Lets other processes on a GPU have what PyTorch keeps there for later. No recorded CUDA graph may be left."""
    if device.type == "cuda":
        _wait(device)
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for every stream that has multiplied, and each recording has one of its own
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(tensor: torch.Tensor) -> int:
    """The same for all tensors in one storage, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
