"""Weights by process group, in processes of their own over gloo."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.processes import copies
from verst.errors import DeadlineExceeded, InvariantViolation
from verst.types import Manifest, TensorEntry
from verst.weights.checksum import tensor_checksum
from verst.weights.files import describe
from verst.weights.group import GroupAddress, GroupUpdate, Member, WeightGroup, enter, join, open_store, send
from verst.weights.layout import ALIGNMENT, lay_out, lay_out_buckets

BUCKET_BYTES = 4096
DEADLINE_S = 60.0


def weights(version: int = 1) -> dict[str, torch.Tensor]:
    """Several buckets: some tensors share one, one is larger than any, one is empty, one has no dimensions."""
    generator = torch.Generator().manual_seed(version)
    return {
        "embed": torch.randn(50, 30, generator=generator),
        "norm": torch.randn(17, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(float(version)),
        "transposed": torch.randn(8, 40, generator=generator).T,
        "last": torch.randn(33, 21, generator=generator),
    }


def manifest(version: int = 1) -> Manifest:
    return describe(version, iter(weights(version).items()))


def entry(name: str, nbytes: int) -> TensorEntry:
    return TensorEntry(name, (nbytes,), "uint8", "", nbytes)


@pytest.mark.parametrize("bucket_bytes", [1, 64, 200, 1000, 10**6])
def test_every_tensor_is_in_one_bucket_and_buckets_keep_their_size(bucket_bytes: int):
    entries = [entry(str(i), nbytes) for i, nbytes in enumerate([10, 64, 0, 100, 500, 1, 63, 65])]
    buckets = lay_out_buckets(entries, bucket_bytes)
    assert [e for bucket in buckets for e in bucket.entries] == entries
    for bucket in buckets:
        assert bucket.nbytes <= bucket_bytes or len(bucket.entries) == 1
        ends = [offset + e.nbytes for offset, e in zip(bucket.offsets, bucket.entries, strict=True)]
        assert all(offset % ALIGNMENT == 0 for offset in bucket.offsets)
        assert all(end <= offset for end, offset in zip(ends, bucket.offsets[1:], strict=False))
        assert bucket.nbytes == ends[-1]


def test_tensors_of_a_module_stay_in_one_bucket():
    names = ["m.layers.0.norm.weight", *(f"m.layers.0.attn.{p}_proj.weight" for p in "qkv"), "m.layers.0.experts.1.up.weight"]
    buckets = lay_out_buckets([entry(name, 64) for name in names], 200)
    assert [[e.name.split(".", 3)[3] for e in bucket.entries] for bucket in buckets] == [
        ["norm.weight"],
        ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"],
        ["experts.1.up.weight"],
    ]


def test_a_layout_by_hand():
    assert lay_out([entry("a", 10), entry("b", 64), entry("c", 1)]).offsets == (0, 64, 128)
    assert [str(b) for b in lay_out_buckets([entry("a", 10), entry("b", 64), entry("c", 1)], 128)] == ["a to b (2 tensors)", "c"]


class Members:
    """Processes 1 and 2 receive; the test's own process is the sender."""

    def __init__(self, shared: bool, world: int = 3) -> None:
        self.store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
        self.address = GroupAddress("127.0.0.1", self.store.port, "test/0", world, shared)
        self._processes = ProcessPoolExecutor(world - 1, copies())

    def receive(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        return [self._processes.submit(work, self.address, rank, *args) for rank in range(1, self.address.world)]

    def sender(self) -> Member:
        return enter(self.store, self.address, 0, device="cpu", timeout_s=DEADLINE_S)

    def close(self) -> None:
        self._processes.shutdown(wait=True)


@pytest.fixture(params=[False, True], ids=["broadcast", "shared"])
def members(request: pytest.FixtureRequest) -> Iterator[Members]:
    made = Members(request.param)
    yield made
    made.close()


def checksums(address: GroupAddress, rank: int, versions: int, deadline_s: float = DEADLINE_S) -> list[dict[str, str]]:
    torch.set_num_threads(1)
    group = join(address, rank, device="cpu", timeout_s=DEADLINE_S)
    updates = [GroupUpdate(manifest(version), BUCKET_BYTES, deadline_s).at(group) for version in range(1, versions + 1)]
    return [{name: slowly(tensor, rank) for name, tensor in update.tensors()} for update in updates]


def slowly(tensor: torch.Tensor, rank: int) -> str:
    """The last member's time with a tensor is long: nobody may write over it meanwhile."""
    if rank == 2:
        time.sleep(0.05)
    return tensor_checksum(tensor)


@pytest.mark.slow
def test_receivers_hold_what_was_sent_version_after_version(members: Members):
    received = members.receive(checksums, 2)
    group = members.sender()
    for version in (1, 2):
        send(group, manifest(version), iter(weights(version).items()), bucket_bytes=BUCKET_BYTES, deadline_s=DEADLINE_S)
    expected = [{name: tensor_checksum(t) for name, t in weights(version).items()} for version in (1, 2)]
    assert [future.result(DEADLINE_S) for future in received] == [expected, expected]


@pytest.mark.slow
def stop_at_the_first(address: GroupAddress, rank: int) -> list[str]:
    """Takes one tensor of version 1, then all of version 2."""
    torch.set_num_threads(1)
    group = join(address, rank, device="cpu", timeout_s=DEADLINE_S)
    first = GroupUpdate(manifest(1), BUCKET_BYTES, DEADLINE_S).at(group).tensors()
    next(first)
    first.close()  # type: ignore[attr-defined]
    return [tensor_checksum(tensor) for _, tensor in GroupUpdate(manifest(2), BUCKET_BYTES, DEADLINE_S).at(group).tensors()]


@pytest.mark.slow
def test_who_stops_early_does_not_hold_up_the_others_nor_miss_the_next_version(members: Members):
    received = members.receive(stop_at_the_first)
    group = members.sender()
    for version in (1, 2):
        send(group, manifest(version), iter(weights(version).items()), bucket_bytes=BUCKET_BYTES, deadline_s=DEADLINE_S)
    expected = [tensor_checksum(t) for t in weights(2).values()]
    assert [future.result(DEADLINE_S) for future in received] == [expected, expected]


@pytest.mark.slow
def test_tensors_other_than_the_manifests_are_refused(members: Members):
    received = members.receive(checksums, 1, 1.0)
    group = members.sender()
    wrong = {name: tensor for name, tensor in weights().items() if name != "norm"}
    with pytest.raises(
        InvariantViolation, match=r"the trainer's next tensor is \('empty', .*the manifest says \('norm', \(17,\), 'bfloat16'\)"
    ):
        send(group, manifest(), iter(wrong.items()), bucket_bytes=BUCKET_BYTES, deadline_s=DEADLINE_S)
    short = dict(list(weights().items())[:-1])
    with pytest.raises(InvariantViolation, match=r"the trainer's next tensor is \('none'"):
        send(group, manifest(), iter(short.items()), bucket_bytes=1 << 20, deadline_s=DEADLINE_S)
    for future in received:
        with pytest.raises(DeadlineExceeded):
            future.result(DEADLINE_S)


@pytest.mark.slow
def test_a_sender_that_never_sends_is_named_with_what_it_owes(members: Members):
    received = members.receive(checksums, 1, 0.5)
    group = members.sender()
    for rank, future in enumerate(received, 1):
        with pytest.raises(
            DeadlineExceeded, match=f"rank {rank}: (version 1: receiving embed was not|the sender .* 2 buffers .*) .*in time"
        ):
            future.result(DEADLINE_S)
    group.close()


@pytest.mark.slow
def test_members_that_do_not_come_are_waited_for_only_so_long():
    store = open_store("127.0.0.1", timeout_s=1, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "alone/0", 2)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"weight group alone/0, rank 0: not all of 2 members met at 127\.0\.0\.1:\d+ within 1 s"):
        WeightGroup(store, address, 0, device="cpu", timeout_s=1)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["broadcast", "shared"])
def test_a_dead_member_holds_up_the_others_no_longer_than_a_meeting(shared: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.weights.group.MEETING_S", 0.3)
    store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "dead/0", 3, shared)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        receiver = thread.submit(join, address, 1, device="cpu", timeout_s=DEADLINE_S)
        with pytest.raises(DeadlineExceeded, match=r"dead/0, rank 0: not all of 3 members met at 127\.0\.0\.1:\d+ within 0\.3 s"):
            enter(store, address, 0, device="cpu", timeout_s=DEADLINE_S)
        with pytest.raises(DeadlineExceeded, match=r"dead/0, rank 1: not all of 3 members met"):
            receiver.result(DEADLINE_S)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["broadcast", "shared"])
@pytest.mark.parametrize("joins", [False, True])
def test_a_sender_is_called_off(shared: bool, joins: bool):
    """Whether it waits for the receiver to come, or to receive: not until its own limit."""
    called_off = threading.Event()
    store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "off/0", 2, shared)

    def sends() -> Member:
        group = enter(store, address, 0, device="cpu", timeout_s=DEADLINE_S, called_off=called_off.is_set)
        send(group, manifest(), iter(weights().items()), bucket_bytes=BUCKET_BYTES, deadline_s=DEADLINE_S)
        return group

    with ThreadPoolExecutor(2) as threads:
        sending = threads.submit(sends)
        receiver = join(address, 1, device="cpu", timeout_s=DEADLINE_S) if joins else None
        called_off.set()
        with pytest.raises(DeadlineExceeded, match=r"off/0, rank 0: .* called off"):
            sending.result(DEADLINE_S / 2)
        del receiver  # gloo lets go of what it sends with its receiver


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["broadcast", "shared"])
def test_the_others_do_not_wait_for_a_sender_that_left(shared: bool):
    """One receiver dies, the sender is called off and leaves; the receiver that lives is free to join another group."""
    called_off = threading.Event()
    store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "left/0", 3, shared)

    def sends() -> None:
        group = enter(store, address, 0, device="cpu", timeout_s=DEADLINE_S, called_off=called_off.is_set)
        try:
            send(group, manifest(), iter(weights().items()), bucket_bytes=BUCKET_BYTES, deadline_s=DEADLINE_S)
        finally:
            group.close()

    with ThreadPoolExecutor(3) as threads:
        threads.submit(sends)
        dead = threads.submit(join, address, 2, device="cpu", timeout_s=DEADLINE_S)
        living = threads.submit(checksums, address, 1, 1)
        dead.result(DEADLINE_S)
        del dead
        called_off.set()
        with pytest.raises(DeadlineExceeded, match="left/0, rank 1: version 1: receiving"):
            living.result(DEADLINE_S / 2)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["broadcast", "shared"])
def test_the_sender_may_come_later_than_that(shared: bool, monkeypatch: pytest.MonkeyPatch):
    """It may be in the middle of a step, the receivers are not."""
    monkeypatch.setattr("verst.weights.group.MEETING_S", 2.0)
    store = open_store("127.0.0.1", timeout_s=DEADLINE_S, listen=True)
    address = GroupAddress("127.0.0.1", store.port, "late/0", 2, shared)
    with ThreadPoolExecutor(1) as thread:
        receiver = thread.submit(join, address, 1, device="cpu", timeout_s=DEADLINE_S)
        time.sleep(2.5)
        members = enter(store, address, 0, device="cpu", timeout_s=DEADLINE_S), receiver.result(DEADLINE_S)
    assert [member.rank for member in members] == [0, 1]
    for member in members:
        member.close()


def test_a_place_where_nobody_listens_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = GroupAddress("127.0.0.1", taken.getsockname()[1], "nobody/0", 2)
        with pytest.raises(DeadlineExceeded, match=r"weight group nobody/0, rank 1: nobody answered at 127\.0\.0\.1:\d+ within 1 s"):
            join(address, 1, device="cpu", timeout_s=1)
