"""Memory that is given up and taken back below tensors that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verst.errors import ConfigError, InvariantViolation
from verst.weights.offload import Offload, own_memory

CPU = torch.device("cpu")


def held(*tensors: torch.Tensor) -> int:
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_views_of_one_storage_go_and_come_back_together():
    flat = torch.arange(12.0)
    head, tail = flat[:5], flat[5:].view(7)
    other = torch.randn(3, 4, dtype=torch.bfloat16)
    before = flat.clone(), other.clone()
    offload = Offload(CPU)
    offload.release([head, tail, other])
    assert offload.is_away
    assert held(flat, other) == 0
    offload.take_back()
    assert not offload.is_away
    assert torch.equal(flat, before[0])
    assert torch.equal(torch.cat((head, tail)), before[0])  # the views look into the same memory as before
    assert torch.equal(other, before[1])
    flat[6] = -1
    assert tail[1] == -1


@pytest.mark.parametrize("piece_bytes", [16, 64, 1 << 20])
def test_bits_survive_whatever_the_pieces_of_host_memory(piece_bytes: int):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in (1, 15, 16, 17, 0, 100, 3)]
    before = [t.clone() for t in tensors]
    offload = Offload(CPU, piece_bytes)
    for _ in range(2):  # the second time into the same buffers
        offload.release(tensors)
        assert held(*tensors) == 0
        offload.take_back()
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    pieces = offload._host._pieces
    assert sum(map(len, pieces)) < 2 * (152 + piece_bytes)
    assert all(len(piece) & (len(piece) - 1) == 0 for piece in pieces)  # powers of two, which pinned memory is rounded up to


def test_what_is_dropped_comes_back_as_zeros_and_takes_no_host_memory():
    kept, dropped = torch.ones(4), torch.ones(1000)
    offload = Offload(CPU)
    offload.release([kept], [dropped, kept])  # in both: kept
    assert held(kept, dropped) == 0
    offload.take_back()
    assert torch.equal(kept, torch.ones(4))
    assert torch.equal(dropped, torch.zeros(1000))
    assert sum(map(len, offload._host._pieces)) == 16


def test_memory_that_others_need_stays():
    flat = torch.arange(6.0)
    state = torch.ones(6)
    offload = Offload(CPU)
    offload.release([flat[2:], state], but=[flat[:1]])
    assert held(flat) == 24
    assert held(state) == 0
    offload.take_back()
    assert torch.equal(state, torch.ones(6))


def test_memory_is_given_up_once():
    tensor, other = torch.ones(3), torch.ones(5)
    offload, second = Offload(CPU), Offload(CPU)
    offload.take_back()  # nothing is away: nothing happens
    offload.release([tensor])
    with pytest.raises(InvariantViolation, match="given up already"):
        offload.release([other])
    with pytest.raises(InvariantViolation, match=r"tensor \(3,\) cannot be given up: it is given up already"):
        second.release([other, tensor])
    assert held(other) == 20
    offload.take_back()


def test_memory_of_a_mapped_file_is_refused_or_replaced(tmp_path: Path):
    (tmp_path / "weights").write_bytes(bytes(64))
    mapped = torch.nn.Module()
    mapped.weight = torch.nn.Parameter(torch.from_file(str(tmp_path / "weights"), size=16))
    with pytest.raises(InvariantViolation, match=r"tensor \(16,\) cannot be given up: it is part of a mapped file"):
        Offload(CPU).release(mapped.parameters())
    weight = mapped.weight
    own_memory(mapped)
    assert mapped.weight is weight
    offload = Offload(CPU)
    offload.release(mapped.parameters())
    offload.take_back()
    assert torch.equal(weight, torch.zeros(16))


def test_a_host_without_room_is_told_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.ones(1 << 20)
    offload = Offload(CPU)

    def full(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("cannot pin")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(ConfigError, match=r"the host has no room for 0\.0 GiB .*cannot pin"):
            offload.release([tensor])
    assert not offload.is_away
    assert torch.equal(tensor, torch.ones(1 << 20))
