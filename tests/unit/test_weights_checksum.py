import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verst.types import TensorEntry
from verst.weights.checksum import ROW_WORDS, manifest_digest, tensor_checksum, tensor_checksums

ROW = 2 * ROW_WORDS  # float32 elements of one row of the hash
MASK = 2**64 - 1


def by_the_book(tensor: torch.Tensor) -> str:
    """The hash from its definition, in Python integers."""
    keys = []
    for i in range(1, ROW_WORDS + 1):
        z = i * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        keys.append((z ^ z >> 31) | 1)
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.blake2b(f"{str(tensor.dtype)[6:]}{list(tensor.shape)}".encode(), digest_size=8)
    for start in range(0, len(data), 8 * ROW_WORDS):
        row = data[start : start + 8 * ROW_WORDS].ljust(8 * ROW_WORDS, b"\0")
        words = [int.from_bytes(row[i : i + 8], "little", signed=True) for i in range(0, len(row), 8)]
        digest.update((sum(k * w for k, w in zip(keys, words, strict=True)) & MASK).to_bytes(8, "little"))
        digest.update((sum(k * (w >> 32) for k, w in zip(keys, words, strict=True)) & MASK).to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), torch.float32), ((0, 4), torch.bfloat16), ((3, 5), torch.bfloat16), ((7,), torch.bool), ((5, 41, 201), torch.float32)],
)
def test_it_is_the_hash_that_is_documented(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert tensor_checksum(tensor) == by_the_book(tensor)


def test_it_stays_the_same_between_versions_of_verst():
    """Journals and manifests hold these numbers."""
    assert tensor_checksum(torch.arange(100_000, dtype=torch.int32)) == "e1e8c5ce51621dbe"


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_does_not_matter(dtype: torch.dtype):
    tensor = (torch.randn(300, 517, generator=torch.Generator().manual_seed(1)) * 3).to(torch.float16).to(dtype)
    expected = tensor_checksum(tensor)
    assert tensor_checksum(tensor.T.contiguous().T) == expected
    wide = torch.zeros(300, 1034, dtype=torch.float32).to(dtype)
    wide[:, ::2] = tensor
    assert tensor_checksum(wide[:, ::2]) == expected
    shifted = torch.cat([torch.zeros(1, dtype=torch.float32).to(dtype).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)])
    at_odd_offset = shifted[dtype.itemsize :]
    assert at_odd_offset.storage_offset() == dtype.itemsize
    assert tensor_checksum(at_odd_offset.clone().view(dtype).view(300, 517)) == expected
    if dtype.itemsize == 1:
        assert tensor_checksum(at_odd_offset.view(dtype).view(300, 517)) == expected


def test_large_slices_that_are_not_contiguous_are_read_piece_by_piece():
    tensor = torch.randn(2, 3, 700, 400)
    assert tensor_checksum(tensor.transpose(2, 3)) == tensor_checksum(tensor.transpose(2, 3).contiguous())
    assert tensor_checksum(torch.ones(1).expand(1, 900, 500)) == tensor_checksum(torch.ones(1, 900, 500))


def test_many_small_tensors_are_hashed_as_each_alone():
    generator = torch.Generator().manual_seed(4)
    shapes = [(3,), (), (0,), (ROW,), (1, 5), (ROW + 1,), (64, 48), (2, ROW), (7,)] * 40  # small ones of more than one chunk in all
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[i % 5]) for i, shape in enumerate(shapes)]
    tensors += [tensors[6].T, torch.randn(9, generator=generator)[1:]]
    assert tensor_checksums(tensors) == [by_the_book(tensor) for tensor in tensors[:9]] + [tensor_checksum(t) for t in tensors[9:]]


def test_dtype_and_shape_count():
    zeros = torch.zeros(8)
    sums = {tensor_checksum(t) for t in (zeros, zeros.view(2, 4), zeros.view(4, 2), zeros.view(torch.int32), zeros[:7], zeros.double())}
    assert len(sums) == 6
    assert tensor_checksum(torch.tensor(0.0)) != tensor_checksum(torch.tensor([0.0]))
    assert tensor_checksum(torch.tensor(0.0)) != tensor_checksum(torch.tensor(-0.0))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_is_seen(data: st.DataObject) -> None:
    words = data.draw(st.sampled_from([1, 7, ROW, 2 * ROW + 3]))
    tensor = torch.arange(words, dtype=torch.int32)
    before = tensor_checksum(tensor)
    tensor[data.draw(st.integers(0, words - 1))] ^= data.draw(st.sampled_from([1 << bit for bit in range(31)] + [-(2**31)]))
    assert tensor_checksum(tensor) != before


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_two_swapped_elements_are_seen(data: st.DataObject) -> None:
    values = torch.randn(3 * ROW, generator=torch.Generator().manual_seed(2))
    before = tensor_checksum(values)
    i, j = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    values[[i, j]] = values[[j, i]]
    assert tensor_checksum(values) != before


def test_errors_of_whole_rows_are_seen():
    matrix = torch.randn(8, ROW, generator=torch.Generator().manual_seed(3))
    before = tensor_checksum(matrix)
    assert tensor_checksum(matrix[[1, 0, *range(2, 8)]]) != before  # rows of the hash itself
    small = torch.randn(64, 48)
    assert tensor_checksum(small[[0, 2, 1, *range(3, 64)]]) != tensor_checksum(small)
    assert tensor_checksum(small.roll(1, 0)) != tensor_checksum(small)


def test_signs_are_seen_wherever_they_stand():
    """A plain multilinear sum with odd keys misses these: the top bit of a word adds 2⁶³ whatever its key."""
    ones = torch.ones(64)
    checksums = set()
    for i in range(1, 64, 2):
        for j in range(i + 2, 64, 2):
            flipped = ones.clone()
            flipped[[i, j]] = -1
            checksums.add(tensor_checksum(flipped))
    assert len(checksums) == 32 * 31 // 2
    assert tensor_checksum(ones) not in checksums
    assert tensor_checksum(-ones) != tensor_checksum(ones)


def test_parameters_are_hashed_as_their_values():
    values = torch.randn(5)
    assert tensor_checksum(torch.nn.Parameter(values)) == tensor_checksum(values)


def entry(name: str, checksum: str) -> TensorEntry:
    return TensorEntry(name, (1,), "float32", checksum, 4)


def test_the_weights_hash_is_of_names_and_checksums_in_any_order():
    entries = [entry("a", "00"), entry("b", "01")]
    digest = manifest_digest(entries)
    assert digest == hashlib.blake2b(b"a\x0000\nb\x0001\n", digest_size=16).hexdigest()
    assert manifest_digest(reversed(entries)) == digest
    assert manifest_digest([entry("a", "01"), entry("b", "00")]) != digest
    assert manifest_digest(entries[:1]) != digest


def test_keys_are_odd_and_distinct():
    from verst.weights.checksum import _keys

    keys = _keys(torch.device("cpu")).numpy()
    assert (keys & 1).all()
    assert len(np.unique(keys)) == ROW_WORDS
