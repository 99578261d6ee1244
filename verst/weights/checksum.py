"""One hash of a tensor's bits, the same on CPU and GPU and for any memory layout.

The bytes are read as 64-bit words w in rows of `ROW_WORDS`. Each row gives two multilinear sums modulo 2⁶⁴ (Carter and Wegman, "Universal
classes of hash functions", 1979) with fixed odd pseudo-random 64-bit keys k:

    A = Σ kᵢ·wᵢ        B = Σ kᵢ·(wᵢ >> 32)

Integer sums do not depend on the order of summation, so any device and any parallel reduction gives the same numbers. All keys are odd, so
a change of one word always changes A; a change of several words goes unseen by A with chance 2⁻³² at most if it touches the low 32 bits of
any of them, and by B likewise if it touches only high ones (a change of bit 63 is the same multiple of 2⁶³ for every odd key, so A alone
would miss two swapped signs). BLAKE2b over dtype, shape and the sums in order makes the digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from verst.types import TensorEntry
from verst.weights.layout import BUCKET_BYTES

ROW_WORDS = 4096

_ROW_BYTES = 8 * ROW_WORDS
_CHUNK_BYTES = 16 * _ROW_BYTES  # 0.5 MiB stays in cache
_DIGEST_BYTES = 8

Item = TypeVar("Item")


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits over dtype, shape and every bit of a dense tensor of any dtype, on any device.

    Temporary memory is about 1 MiB on CPU, on a GPU that of a copy if the tensor is not contiguous. −0 differs from 0, NaNs by payload.
    """
    return tensor_checksums([tensor])[0]


def tensor_checksums(tensors: Sequence[torch.Tensor]) -> list[str]:
    """`tensor_checksum` of each, all on one device; on a GPU in one pass over all of them, which is where the time goes.

    Tensors that are not contiguous are copied for it, on a GPU all of them at once.
    """
    return start_checksums(tensors)()


def start_checksums(tensors: Sequence[torch.Tensor]) -> Callable[[], list[str]]:
    """Begins `tensor_checksums` and returns what waits for the result.

    A GPU reads the tensors in the order of its current stream: whoever overwrites them there may do so at once.
    """
    tensors = [tensor.detach() for tensor in tensors]
    kinds = [f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for tensor in tensors]
    if tensors and tensors[0].device.type == "cuda":
        sums = _on_cuda(tensors)
    else:
        found = _host_sums(tensors)
        sums = lambda: found  # noqa: E731
    return lambda: [_digest(kind, sums_of_one) for kind, sums_of_one in zip(kinds, sums(), strict=True)]


def hashed(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Name, tensor and checksum of each. A GPU hashes up to `BUCKET_BYTES` of them while the next ones are made."""
    under_way: tuple[list[tuple[str, torch.Tensor]], Callable[[], list[str]]] = [], list
    for some in _by_bytes(tensors):
        before, checksums = under_way
        under_way = some, start_checksums([tensor for _, tensor in some])
        yield from _with(before, checksums())
    yield from _with(under_way[0], under_way[1]())


def _with(tensors: Iterable[tuple[str, torch.Tensor]], checksums: Iterable[str]) -> Iterator[tuple[str, torch.Tensor, str]]:
    return ((name, tensor, checksum) for (name, tensor), checksum in zip(tensors, checksums, strict=True))


def _by_bytes(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive ones, `BUCKET_BYTES` of them or little more together."""
    return _batches(tensors, lambda item: item[1].nbytes, BUCKET_BYTES)


def _batches(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Consecutive ones, of at least `limit` together but for the last."""
    some: list[Item] = []
    total = 0
    for item in items:
        some.append(item)
        total += size(item)
        if total >= limit:
            yield some
            some, total = [], 0
    if some:
        yield some


def _digest(kind: str, sums: NDArray[np.int64]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=_DIGEST_BYTES)
    digest.update(sums.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _on_cuda(tensors: Sequence[torch.Tensor]) -> Callable[[], list[NDArray[np.int64]]]:
    from verst.weights.checksum_cuda import start_row_sums

    ready = [tensor.contiguous() for tensor in tensors]
    ready = [tensor.clone() if tensor.data_ptr() % 8 else tensor for tensor in ready]  # words must be aligned
    return start_row_sums(ready, _keys(tensors[0].device))


def _host_sums(tensors: Sequence[torch.Tensor]) -> list[NDArray[np.int64]]:
    small = _one_row_sums([tensor for tensor in tensors if 0 < tensor.nbytes <= _ROW_BYTES])
    return [next(small) if 0 < tensor.nbytes <= _ROW_BYTES else _many_row_sums(tensor) for tensor in tensors]


def _many_row_sums(tensor: torch.Tensor) -> NDArray[np.int64]:
    keys = _keys(tensor.device)
    sums = [_row_sums(rows, keys) for rows in _rows(tensor)]
    return torch.cat(sums).numpy() if sums else np.zeros(0, np.int64)


def _one_row_sums(tensors: Sequence[torch.Tensor]) -> Iterator[NDArray[np.int64]]:
    """Of tensors of one row each, some `_CHUNK_BYTES` at a time: a call for each would take longer than its sums."""
    for some in _batches(tensors, lambda tensor: tensor.nbytes, _CHUNK_BYTES):
        lengths = [-(-tensor.nbytes // 8) for tensor in some]
        bytes_of_all = [part for tensor in some for part in (tensor.reshape(-1).view(torch.uint8), *_filling(tensor))]
        words = torch.cat(bytes_of_all).view(torch.int64)
        keys = torch.cat([_keys(words.device)[:length] for length in lengths])
        # Differences of running sums modulo 2⁶⁴ are the sums of the parts.
        running = torch.stack([words * keys, (words >> 32) * keys]).cumsum(1)[:, torch.tensor(lengths).cumsum(0) - 1]
        yield from running.diff(prepend=running.new_zeros(2, 1)).T.numpy()


def _filling(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What fills a tensor's bytes up to whole words."""
    return [torch.zeros(-tensor.nbytes % 8, dtype=torch.uint8)] if tensor.nbytes % 8 else []


def manifest_digest(entries: Iterable[TensorEntry]) -> str:
    """The weights hash: 32 hexadecimal digits over all names and checksums, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in sorted(entries, key=lambda entry: entry.name):
        digest.update(f"{entry.name}\0{entry.checksum}\n".encode())
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """As `TensorEntry.dtype` spells it: "float32", "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _row_sums(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A and B of each row: `[2, rows]` int64."""
    return torch.cat([torch.mv(rows, keys), torch.mv(rows >> 32, keys)]).view(2, -1).T.reshape(-1)


def _rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's bytes as int64 `[rows, ROW_WORDS]` blocks in order, the last row filled up with zeros."""
    rest = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    for piece in _pieces(tensor, _CHUNK_BYTES):
        joined = torch.cat([rest, piece]) if len(rest) else piece
        whole = len(joined) // _ROW_BYTES * _ROW_BYTES
        if whole:
            yield _words(joined[:whole])
        rest = joined[whole:]
    if len(rest):
        yield _words(torch.cat([rest, rest.new_zeros(_ROW_BYTES - len(rest))]))


def _words(piece: torch.Tensor) -> torch.Tensor:
    if piece.storage_offset() % 8 or piece.data_ptr() % 8:  # words must be aligned; only odd slices and odd files come here
        piece = piece.clone()
    return piece.view(torch.int64).view(-1, ROW_WORDS)


def _pieces(tensor: torch.Tensor, chunk_bytes: int) -> Iterator[torch.Tensor]:
    """The tensor's bytes in row-major order, as flat uint8 tensors of at most `chunk_bytes`; views where memory is contiguous."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).view(torch.uint8).split(chunk_bytes)
    elif tensor.nbytes <= chunk_bytes:
        yield tensor.contiguous().reshape(-1).view(torch.uint8)
    else:
        slice_bytes = tensor.nbytes // tensor.shape[0]
        for part in tensor.split(max(1, chunk_bytes // slice_bytes)):
            yield from _pieces(part[0] if len(part) == 1 else part, chunk_bytes)


@lru_cache(maxsize=16)
def _keys(device: torch.device) -> torch.Tensor:
    """`ROW_WORDS` odd 64-bit numbers of the SplitMix64 sequence (Steele, Lea and Flood, 2014) from seed 0."""
    z = np.arange(1, ROW_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31)) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)
