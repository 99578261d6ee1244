import asyncio
import gc
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from verst.errors import ConfigError, DeadlineExceeded, InvariantViolation, TrainingDiverged, WeightMismatch
from verst.protocols import WeightUpdate
from verst.types import Manifest, PauseMode
from verst.weights import location
from verst.weights.checksum import tensor_checksum
from verst.weights.files import FileUpdate, describe, publish
from verst.weights.location import publish_directory, remove_directory, remove_versions
from verst.weights.push import check_probe, compare_probe, push, verify


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(11, 7, generator=generator),
        "layers.0.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "scale": torch.tensor(0.5),
        "layers.0.mask": torch.tensor([True, False, True]),
        "layers.1.weight": torch.randn(6, 9, generator=generator).T,
        "fp8": torch.randn(13, generator=generator).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 4),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_published_is_read_back_bit_for_bit(tmp_path: Path):
    tensors = model()
    manifest = publish(3, iter(tensors.items()), tmp_path)
    assert manifest.version == 3
    assert [entry.name for entry in manifest.entries] == list(tensors)
    update: WeightUpdate = pickle.loads(pickle.dumps(FileUpdate(manifest)))
    read = list(update.tensors())
    assert [name for name, _ in read] == list(tensors)
    for name, tensor in read:
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert bits(tensor) == bits(tensors[name])
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
    verify(manifest, {name: update.checksum(tensor) for name, tensor in read})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003.weights"]


def test_describe_gives_the_same_digest_without_a_file(tmp_path: Path):
    published = publish(1, iter(model().items()), tmp_path)
    described = describe(1, iter(model().items()))
    assert (described.digest, described.entries, described.location) == (published.digest, published.entries, "")


def test_an_engine_that_writes_into_a_mapped_tensor_changes_nothing_for_others(tmp_path: Path):
    update = FileUpdate(publish(1, iter(model().items()), tmp_path))
    dict(update.tensors())["embed.weight"].zero_()
    assert torch.equal(dict(update.tensors())["embed.weight"], model()["embed.weight"])


def test_mapped_tensors_outlive_update_and_file(tmp_path: Path):
    kept = dict(FileUpdate(publish(1, iter(model().items()), tmp_path)).tensors())["embed.weight"]
    remove_versions(tmp_path, keep=())
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert torch.equal(kept, model()["embed.weight"])


def test_a_model_of_nothing_and_a_zero_dimensional_last_tensor(tmp_path: Path):
    for tensors in ({}, {"none": torch.empty(0)}, {"a": torch.ones(3), "none": torch.empty(2, 0)}):
        read = dict(FileUpdate(publish(1, iter(tensors.items()), tmp_path)).tensors())
        assert {name: tensor.shape for name, tensor in read.items()} == {name: tensor.shape for name, tensor in tensors.items()}


def test_old_versions_and_whole_directories_are_removed(tmp_path: Path):
    directory = tmp_path / "verst-run"
    for version in (1, 2, 3):
        publish(version, iter(model().items()), directory)
    remove_versions(directory, keep=(2, 3))
    assert sorted(path.name for path in directory.iterdir()) == ["00000002.weights", "00000003.weights"]
    remove_directory(directory)
    remove_directory(directory)
    assert not directory.exists()


def test_directories_are_named_by_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert publish_directory("r1", "/disk/x") == Path("/disk/x/verst-r1")
    monkeypatch.setattr(location, "_SHARED_MEMORY", tmp_path)
    assert publish_directory("r1", None) == tmp_path / "verst-r1"


def test_no_room_is_told_with_location_bytes_and_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(
            ConfigError, match=rf"weights.location: {tmp_path} .*No space left on device.*at least 308 bytes are needed, \d+ are free"
        ):
            publish(1, iter(model().items()), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"weights.location: .*/file/below"):
        publish(1, iter(model().items()), tmp_path / "file" / "below")


def test_a_trainer_that_fails_while_publishing_leaves_nothing_behind(tmp_path: Path):
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        raise ArithmeticError("collective failed")

    with pytest.raises(ArithmeticError, match="collective failed"):
        publish(1, broken(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_published_twice_is_refused(tmp_path: Path):
    twice = [("a", torch.ones(1)), ("b", torch.ones(1)), ("a", torch.ones(1))]
    with pytest.raises(InvariantViolation, match="more than once: a"):
        publish(1, iter(twice), tmp_path)


def test_a_missing_or_shortened_file_is_told(tmp_path: Path):
    update = FileUpdate(publish(1, iter(model().items()), tmp_path))
    path = Path(update.manifest.location)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightMismatch, match=rf"\(version 1\) has {size - 1} bytes, its manifest demands {size}"):
        next(update.tensors())
    path.unlink()
    with pytest.raises(WeightMismatch, match=r"cannot be read: No such file.*weights.location"):
        next(update.tensors())


def test_verify_names_what_differs(tmp_path: Path):
    tensors = {f"t{i}": torch.full((2,), float(i)) for i in range(8)}
    manifest = publish(4, iter(tensors.items()), tmp_path)
    sums = {entry.name: entry.checksum for entry in manifest.entries}
    verify(manifest, sums)
    with pytest.raises(WeightMismatch, match=rf"^weights of version 4: 1 different: t3 \(published {sums['t3']}, engine bad\)$"):
        verify(manifest, sums | {"t3": "bad"})
    with pytest.raises(
        WeightMismatch, match=r"7 different: t0 .*, t4 \(published \w+, engine bad\) and 2 more; 1 missing in the engine: t7; 1 unk"
    ):
        verify(manifest, dict.fromkeys(list(sums)[:7], "bad") | {"other": "0"})


class Recorder:
    """An engine that records the order of calls. `wrong` loads bits other than the published ones that many times."""

    def __init__(self, wrong: int = 0, slow: str = "") -> None:
        self.events: list[str] = []
        self.version = 0
        self._wrong = wrong
        self._slow = slow

    async def _did(self, event: str) -> None:
        self.events.append(event)
        if event == self._slow:
            await asyncio.sleep(60)

    async def pause(self, mode: PauseMode = PauseMode.IN_PLACE) -> None:
        await self._did("pause" if mode is PauseMode.IN_PLACE else f"pause {mode.value}")

    async def resume(self) -> None:
        await self._did("resume")

    async def logprobs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        await self._did("probe")
        return -tokens_T.astype(np.float32)

    async def update_weights(self, update: WeightUpdate) -> Mapping[str, str]:
        await self._did("update")
        self.version = update.manifest.version
        sums = {name: update.checksum(tensor) for name, tensor in update.tensors()}
        if self._wrong:
            self._wrong -= 1
            sums["scale"] = tensor_checksum(torch.tensor(0.25))
        return sums


@pytest.fixture
def update(tmp_path: Path) -> FileUpdate:
    return FileUpdate(publish(7, iter(model().items()), tmp_path))


async def test_an_engine_serves_after_verification_and_nobody_waits_for_the_probe(update: FileUpdate):
    engine: Any = Recorder()
    logprobs_T = await push(engine, update, deadline_s=10, probe_T=np.array([1, 2], np.int32))
    assert logprobs_T is not None
    assert logprobs_T.tolist() == [-1.0, -2.0]
    assert engine.events == ["pause", "update", "resume", "probe"]
    assert engine.version == 7


async def test_after_a_failure_the_engine_is_left_paused_until_a_push_succeeds(update: FileUpdate):
    engine: Any = Recorder(wrong=1)
    with pytest.raises(WeightMismatch, match=r"weights of version 7: 1 different: scale"):
        await push(engine, update, deadline_s=10)
    assert engine.events == ["pause", "update"]
    await push(engine, update, deadline_s=10)
    assert engine.events == ["pause", "update", "pause", "update", "resume"]


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ("pause", "the engine to pause for version 7"),
        ("update", "load version 7"),
        ("resume", "the engine to resume with"),
        ("probe", "the probe of version 7"),
    ],
)
async def test_every_wait_has_a_deadline_that_names_it(update: FileUpdate, slow: str, named: str):
    engine: Any = Recorder(slow=slow)
    with pytest.raises(DeadlineExceeded, match=rf"waited for .*{named}.*: not done within the 0.2 s"):
        await push(engine, update, deadline_s=0.2, probe_T=np.zeros(1, np.int32))


async def test_a_timeout_inside_the_engine_is_not_taken_for_the_deadline(update: FileUpdate):
    engine: Any = Recorder()

    async def resume() -> None:
        raise TimeoutError("the engine's own")

    engine.resume = resume
    with pytest.raises(TimeoutError, match="the engine's own"):
        await push(engine, update, deadline_s=10)


def test_the_probe_is_the_mean_over_the_tokens_that_were_scored():
    trainer = np.array([0.0, -1.0, -2.5], np.float32)
    engine = np.array([0.0, -1.25, -2.0], np.float32)
    assert compare_probe(trainer, engine) == (0.25 + 0.5) / 2  # nobody scores the first
    assert compare_probe(trainer[:1], engine[:1]) == 0.0
    assert compare_probe(trainer[:0], engine[:0]) == 0.0
    check_probe(0.5, 0.5, 1)
    with pytest.raises(TrainingDiverged, match=r"disagree by 0.5 on average .* the limit is 0.4 \(weights.probe_limit\)"):
        check_probe(0.5, 0.4, 1)
    with pytest.raises(ValueError, match="probe"):
        compare_probe(trainer, engine[:2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_probe_that_is_not_finite_never_passes(value: float):
    logprobs = np.array([0.0, value], np.float32)
    difference = compare_probe(logprobs, logprobs)
    assert np.isnan(difference)
    with pytest.raises(TrainingDiverged, match="disagree by nan"):
        check_probe(difference, 1e9, 1)


def test_a_manifest_can_be_read_without_its_update(tmp_path: Path):
    """The documented layout: each tensor at the next multiple of 64 bytes."""
    manifest: Manifest = publish(1, iter(model().items()), tmp_path)
    raw = Path(manifest.location).read_bytes()
    end = 0
    for entry in manifest.entries:
        start = (end + 63) // 64 * 64
        end = start + entry.nbytes
        assert raw[start:end] == bits(model()[entry.name])
    assert len(raw) == end
