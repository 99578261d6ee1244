"""The trainer's process group, and the model's shards on it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from verst.errors import CollectiveFailed, DeadlineExceeded, DeviceFailed, InvariantViolation, first_line
from verst.training.model import Layered
from verst.weights.offload import own_memory

Value = TypeVar("Value")


def device_of(name: str | None, *, deterministic: bool) -> torch.device:
    """The device (None: a GPU if there is one), with what its kernels need to repeat their bits. CPU kernels do for a number of threads."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Else every tensor is filled with NaN as its memory is taken: a search for errors, which costs speed and changes no bit.
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.cuda.set_device(device.index or 0)
    return device


def own_address() -> str:
    """The address of this machine that faces the network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("10.255.255.255", 1))  # sends nothing: asks the system which of its addresses it would use
            return route.getsockname()[0]
        except OSError:
            return "127.0.0.1"


class Rendezvous:
    """Where the ranks of `init_distributed` meet: a store on this machine, which holds a port of the system's choice as long as it lives.

    A port that was only looked up may belong to somebody else by the time the ranks have loaded what they need.
    """

    def __init__(self) -> None:
        host = own_address()
        self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"


def init_distributed(rank: int, world: int, address: str, timeout_s: float, device: str = "cpu") -> None:
    """Joins the trainer ranks; returns once all are there. One rank needs no group and gets none.

    `address` is that of a `Rendezvous`, one for each group. Gloo carries CPU tensors, NCCL the tensors of a CUDA `device`. `timeout_s`
    holds for the meeting and for every collective after it. Raises `DeadlineExceeded` if the others did not come.
    """
    if world == 1:
        return
    transport = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    host, _, port = address.rpartition(":")
    limit = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, int(port), None, False, limit, wait_for_workers=False)
        dist.init_process_group(transport, store=store, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:  # of several kinds, by store and transport
        raise DeadlineExceeded(
            f"trainer rank {rank} waited {timeout_s:g} s at {address} for the other {world - 1} of {world} ranks: {error}"
        ) from error


def leave_distributed() -> None:
    """Leaves the group, whatever state its peers are in; `init_distributed` may be called again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort_distributed() -> None:
    """Makes collectives that wait for lost peers return, from another thread than theirs. Gloo's do so by themselves when a peer dies."""
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateImportUsage] - it has no public name


_BROKEN_LINK = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
_BROKEN_DEVICE = "CUDA error"


@contextlib.contextmanager
def collectives(what: str) -> Iterator[None]:
    """Around what talks to other ranks: a broken link or device becomes a diagnosis, which says that computing may be tried again.

    Raises `CollectiveFailed` or `DeviceFailed`; everything else as it is.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        said = first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if _BROKEN_DEVICE in said:
            raise DeviceFailed(f"{what}: {said}") from error
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _BROKEN_LINK):
            raise CollectiveFailed(f"{what}: {said}") from error
        raise


def require_group(rank: int, world: int) -> None:
    """Raises `InvariantViolation` unless this process is that rank of a group of that size."""
    if world > 1 and (not dist.is_initialized() or (dist.get_rank(), dist.get_world_size()) != (rank, world)):
        raise InvariantViolation(f"trainer rank {rank} of {world} has no process group of that size: call init_distributed first")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums in float64, the same bits on every rank. A collective."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def all_ranks(value: Value) -> list[Value]:
    """What each rank gives, in order; pickled, so for what is small or rare. A collective."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shard(model: Layered, device: torch.device, world: int, *, master_dtype: torch.dtype) -> None:
    """Splits every parameter over the ranks along dim 0 (FSDP2), one unit for each layer and one for the rest.

    Shards are kept and reduced in `master_dtype`; the forward pass gathers and computes in the dtype the model was loaded in.
    """
    forward_dtype = next(model.parameters()).dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master_dtype)
    precision = MixedPrecisionPolicy(param_dtype=forward_dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (world,))
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # A token's weight is global already, so gradients are summed; FSDP2 would average them.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def place(model: Layered, device: torch.device, world: int, *, kept_dtype: torch.dtype) -> None:
    """Brings a loaded model to its device: with several ranks sharded, each shard a copy in `kept_dtype`."""
    if world > 1:
        shard(model, device, world, master_dtype=kept_dtype)
        model.to(device)
    else:
        own_memory(model.to(device))


def release(model: Layered) -> None:
    """After a forward pass without a backward: the root's gathered parameters would otherwise survive, stale, past the next update."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, sharing memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The full tensor on this rank's device. A collective where the tensor is sharded."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(full: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The rows of a full tensor that FSDP2 gives this rank: equal pieces of ⌈rows / world⌉, the last ones shorter or empty."""
    rows = full.shape[0]
    piece = -(-rows // world)
    return full[min(rank * piece, rows) : min((rank + 1) * piece, rows)]
