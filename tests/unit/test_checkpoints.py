import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.processes import copies
from verst.errors import CheckpointError
from verst.training import checkpoints
from verst.training.checkpoints import (
    CheckpointWriter,
    FileRecord,
    LoadedState,
    commit_checkpoint,
    discard_partial,
    fingerprint,
    latest_checkpoint,
    load_state,
)


def state_of(tensors: dict[str, torch.Tensor], values: dict[str, Any] | None = None) -> LoadedState:
    """The state of a single rank: every tensor is whole."""
    return LoadedState(tensors, values or {}, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def full_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/embed": torch.randn(7, 3, generator=generator),
        "model/half": torch.randn(5, generator=generator).bfloat16(),
        "model/one_row": torch.randn(1, 4, generator=generator),
        "exp_avg/embed": torch.randn(7, 3, generator=generator).double(),
        "fp8": torch.randn(9, 2, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(3),
        "nothing": torch.empty(0, 6),
    }


def shard(rank: int, world: int, seed: int = 0) -> LoadedState:
    """Equal pieces of ⌈rows / world⌉, the last ones shorter or empty; tensors without dimensions are on every rank."""
    full = full_tensors(seed)
    tensors = {}
    for name, tensor in full.items():
        if tensor.dim():
            piece = -(-len(tensor) // world)
            tensor = tensor[min(rank * piece, len(tensor)) : min((rank + 1) * piece, len(tensor))]
        tensors[name] = tensor
    return LoadedState(tensors, {"rng": f"rank {rank}", "updates": 12}, {name: tuple(tensor.shape) for name, tensor in full.items()})


def save(directory: Path, step: int, world: int = 1, keep: int = 9, seed: int = 0) -> Path:
    writers = [CheckpointWriter(directory, step, rank=rank, world=world) for rank in range(world)]
    states = [shard(rank, world, seed) for rank in range(world)]
    for writer, state in zip(writers, states, strict=True):
        writer.begin(state)
    records = [writer.finish() for writer in writers]
    return commit_checkpoint(directory, step, records, fingerprint=fingerprint(states[0]), loop={"seq": 10 * step}, keep=keep)


def assert_bits(found: LoadedState, expected: Mapping[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert found.tensors[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_rank_gets_back_what_it_saved(tmp_path: Path, world: int):
    save(tmp_path, 10, world)
    for rank in range(world):
        state = load_state(tmp_path, 10, rank=rank, world=world)
        assert_bits(state, shard(rank, world).tensors)
        assert state.values == {"rng": f"rank {rank}", "updates": 12}
        assert state.full_shapes == shard(rank, world).full_shapes


@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (3, 2), (1, 4), (8, 3)])
def test_another_number_of_ranks_gets_full_tensors(tmp_path: Path, saved: int, loaded: int):
    save(tmp_path, 10, saved)
    for rank in range(loaded):
        state = load_state(tmp_path, 10, rank=rank, world=loaded)
        assert_bits(state, full_tensors())
        assert state.values["rng"] == f"rank {rank if rank < saved else 0}"


@pytest.mark.parametrize("loaded", [1, 2, 3])
def test_a_state_that_says_itself_where_its_shards_belong_is_never_joined(tmp_path: Path, loaded: int):
    """Its backend reads the files of all ranks, whatever their number."""
    states = [replace(shard(rank, 2), full_shapes={}) for rank in range(2)]
    writers = [CheckpointWriter(tmp_path, 1, rank=rank, world=2) for rank in range(2)]
    for writer, state in zip(writers, states, strict=True):
        writer.begin(state)
    path = commit_checkpoint(tmp_path, 1, [writer.finish() for writer in writers], fingerprint={}, loop={}, keep=1)
    for rank in range(loaded):
        state = load_state(tmp_path, 1, rank=rank, world=loaded)
        assert_bits(state, states[rank if rank < 2 else 0].tensors)
        assert state.files == tuple(path / f"rank-0000{saved}-of-00002.safetensors" for saved in range(2))


def test_the_layout_is_as_documented_and_readable_by_others(tmp_path: Path):
    path = save(tmp_path, 10, world=2)
    assert path == tmp_path / "step-00000010"
    assert sorted(item.name for item in path.iterdir()) == [
        "loop.json",
        "manifest.json",
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
    ]
    foreign = safetensors.torch.load_file(path / "rank-00001-of-00002.safetensors")
    assert torch.equal(foreign["model/embed"], full_tensors()["model/embed"][4:])
    assert json.loads((path / "loop.json").read_text()) == {"seq": 100}


def test_the_newest_is_found_with_the_loops_state(tmp_path: Path):
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    for step in (2, 10, 9):
        save(tmp_path, step, world=2)
    found, skipped = latest_checkpoint(tmp_path, fingerprint(shard(0, 1)))
    assert found is not None
    assert (found.step, found.world, found.loop, skipped) == (10, 2, {"seq": 100}, [])


def test_only_the_newest_are_kept_and_leftovers_are_removed(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, 3, rank=0, world=2)  # an attempt that is never completed
    writer.begin(shard(0, 2))
    writer.finish()
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_checkpoint_of_a_later_step_does_not_count_as_kept(tmp_path: Path):
    """After a corrupt step 30 the run went on from 20: what it saves next must not be removed in favour of 30."""
    save(tmp_path, 30)
    save(tmp_path, 25, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000025", "step-00000030"]
    save(tmp_path, 30, keep=1, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]
    assert_bits(load_state(tmp_path, 30, rank=0, world=1), full_tensors(seed=1))


def test_leftovers_of_another_number_of_ranks_do_not_get_in(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, 10, rank=1, world=2)
    writer.begin(shard(1, 2))
    writer.finish()
    path = save(tmp_path, 10, world=1)
    assert not (path / "rank-00001-of-00002.safetensors").exists()
    assert_bits(load_state(tmp_path, 10, rank=0, world=1), full_tensors())


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) * 3 // 4] ^= 1
    elif how == "shortened":
        del content[-1]
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank-00001-of-00002.safetensors", "loop.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "shortened", "missing"])
def test_a_damaged_checkpoint_is_skipped_and_told(tmp_path: Path, name: str, how: str):
    save(tmp_path, 5, world=2)
    damage(save(tmp_path, 10, world=2) / name, how)
    found, skipped = latest_checkpoint(tmp_path, fingerprint(shard(0, 2)))
    assert found is not None
    assert found.step == 5
    assert len(skipped) == 1
    assert "step-00000010" in skipped[0]
    told = {"flipped": ("corrupt", "damaged"), "shortened": ("bytes instead of", "damaged"), "missing": ("cannot be read", "no readable")}
    assert any(words in skipped[0] for words in told[how])
    damage(tmp_path / "step-00000005" / name, how)
    assert latest_checkpoint(tmp_path)[0] is None
    assert len(latest_checkpoint(tmp_path)[1]) == 2


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path: Path):
    path = save(tmp_path, 1) / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 2
        if damaged.split() == content.split():
            continue  # white space
        path.write_bytes(damaged)
        assert latest_checkpoint(tmp_path)[0] is None, position


def test_a_damaged_or_missing_file_is_never_loaded(tmp_path: Path):
    with pytest.raises(CheckpointError, match="step-00000010 has no readable manifest"):
        load_state(tmp_path, 10, rank=0, world=1)
    for step, how, told in ((20, "shortened", "bytes instead of"), (30, "missing", "cannot be read")):
        damage(save(tmp_path, step) / "rank-00000-of-00001.safetensors", how)
        with pytest.raises(CheckpointError, match=rf"step-000000{step}/rank-00000-of-00001.safetensors .*{told}"):
            load_state(tmp_path, step, rank=0, world=1)
    damage(save(tmp_path, 40) / "rank-00000-of-00001.safetensors", "flipped")
    assert latest_checkpoint(tmp_path)[0] is None, "what the run restores is only what this found whole"


def test_each_file_is_hashed_once_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that another number of ranks has written is read by all of them: hashing it in each would cost more than loading."""
    save(tmp_path, 10, world=2)
    hashed: list[str] = []
    check = checkpoints.check_file

    def counted(path: Path, record: FileRecord) -> None:
        hashed.append(record.name)
        check(path, record)

    monkeypatch.setattr(checkpoints, "check_file", counted)
    assert latest_checkpoint(tmp_path)[0] is not None
    for rank in range(4):
        load_state(tmp_path, 10, rank=rank, world=4)
    assert sorted(hashed) == ["loop.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]


def test_a_checkpoint_of_another_model_names_the_tensors(tmp_path: Path):
    save(tmp_path, 10)
    tensors = full_tensors() | {"model/half": torch.zeros(5), "model/embed": torch.zeros(8, 3), "added": torch.ones(2)}
    del tensors["flags"]
    other = state_of(tensors)
    with pytest.raises(CheckpointError) as told:
        latest_checkpoint(tmp_path, fingerprint(other))
    message = str(told.value)
    assert "step-00000010 is of another model: added (absent in the checkpoint, float32[2] in the model)" in message
    assert "flags (bool[3] in the checkpoint, absent in the model)" in message
    assert "model/embed (float32[7, 3] in the checkpoint, float32[8, 3] in the model)" in message
    assert "model/half (bfloat16[5] in the checkpoint, float32[5] in the model)" in message
    assert "exp_avg" not in message


def test_shards_that_do_not_fit_together_are_refused(tmp_path: Path):
    second = shard(1, 2)
    second.tensors = {**second.tensors, "model/embed": second.tensors["model/embed"][:1]}
    states = [shard(0, 2), second]
    records = []
    for rank, state in enumerate(states):
        writer = CheckpointWriter(tmp_path, 1, rank=rank, world=2)
        writer.begin(state)
        records.append(writer.finish())
    commit_checkpoint(tmp_path, 1, records, fingerprint={}, loop={}, keep=1)
    with pytest.raises(CheckpointError, match=r"model/embed was saved in shards of shapes \[\(4, 3\), \(1, 3\)\].* make up \(7, 3\)"):
        load_state(tmp_path, 1, rank=0, world=1)


def test_a_commit_needs_every_rank(tmp_path: Path):
    writers = [CheckpointWriter(tmp_path, 1, rank=rank, world=2) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.begin(shard(rank, 2))
    records = [writer.finish() for writer in writers]
    for given in ([], records[:1], [records[0], records[0]]):
        with pytest.raises(CheckpointError, match="are needed"):
            commit_checkpoint(tmp_path, 1, given, fingerprint={}, loop={}, keep=1)
    longer = FileRecord(records[1].name, records[1].nbytes + 1, records[1].sha256)
    with pytest.raises(CheckpointError, match="missing or shorter"):
        commit_checkpoint(tmp_path, 1, [records[0], longer], fingerprint={}, loop={}, keep=1)
    assert latest_checkpoint(tmp_path) == (None, [])


def limit_files() -> None:
    """Files cannot grow beyond 8 KiB: the writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Executor]:
    """Runs functions in a process of their own under :func:`limit_files`: pytest's own output may be a file, too."""
    with ProcessPoolExecutor(1, copies(), limit_files) as executor:
        yield executor


def save_until_full(directory: Path) -> None:
    save(directory, 5)
    writer = CheckpointWriter(directory, 10, rank=0, world=1)
    writer.begin(state_of({"big": torch.zeros(10_000)}))
    with pytest.raises(CheckpointError, match=r"could not be written \(File too large; at least 40\d+ bytes are needed, \d+ are free\)"):
        writer.finish()
    assert list((directory / "step-00000010.partial").iterdir()) == []
    discard_partial(directory, 10)
    assert [path.name for path in directory.iterdir()] == ["step-00000005"]
    save(directory, 15, keep=1)  # the run goes on, and the next one is written


@pytest.mark.slow
def test_a_full_disk_is_told_and_former_checkpoints_stay(tmp_path: Path, small_disk: Executor):
    small_disk.submit(save_until_full, tmp_path).result(60)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000015"]


def commit_until_full(directory: Path) -> None:
    save(directory, 5)
    writer = CheckpointWriter(directory, 10, rank=0, world=1)
    writer.begin(shard(0, 1))
    with pytest.raises(CheckpointError, match=r"loop.json could not be written"):
        commit_checkpoint(directory, 10, [writer.finish()], fingerprint={}, loop={"x": "y" * 10_000}, keep=1)


def test_a_full_disk_while_committing_leaves_former_checkpoints(tmp_path: Path, small_disk: Executor):
    small_disk.submit(commit_until_full, tmp_path).result(60)
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (5, [])


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file", 1, rank=0, world=1)
    writer.begin(shard(0, 1))
    with pytest.raises(CheckpointError, match="Former checkpoints are intact"):
        writer.finish()


def test_a_type_that_cannot_be_held_is_named(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, 1, rank=0, world=1)
    writer.begin(state_of({"z": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(CheckpointError, match=r"z has type torch.complex64"):
        writer.finish()


def test_files_are_durable_before_the_directory_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(file: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")
        fsync(file)

    def recording_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    save(tmp_path, 1)
    assert events == [
        "fsync rank-00000-of-00001.safetensors",
        "fsync loop.json",
        "fsync manifest.json",
        "fsync step-00000001.partial",
        "rename step-00000001.partial",
        f"fsync {tmp_path.name}",
    ]


SAVER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from verst.training.checkpoints import CheckpointWriter, LoadedState, commit_checkpoint, fingerprint
    torch.set_num_threads(1)
    for step in range(1, 10_000):
        state = LoadedState({"a": torch.full((50_000,), float(step)), "b": torch.full((3,), step)}, {}, {})
        writer = CheckpointWriter(Path(sys.argv[1]), step, rank=0, world=1)
        writer.begin(state)
        commit_checkpoint(Path(sys.argv[1]), step, [writer.finish()], fingerprint=fingerprint(state), loop={"step": step}, keep=2)
        print(step, flush=True)
    """
)


@pytest.mark.slow
def test_a_saver_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path):
    saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None
    committed = 0
    while committed < 5:
        committed = int(saver.stdout.readline())
    saver.send_signal(signal.SIGKILL)
    rest = saver.stdout.read().split()
    saver.stdout.close()
    saver.wait(10)
    committed = int(rest[-1]) if rest else committed
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step >= committed
    assert skipped == []
    assert found.loop == {"step": found.step}
    state = load_state(tmp_path, found.step, rank=0, world=1)
    assert state.tensors["a"].eq(found.step).all()
    assert state.tensors["b"].eq(found.step).all()


class Died(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", range(1, 12))
def test_a_death_at_any_call_to_the_disk_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, again: bool):
    """Ends a save at its n-th fsync, rename or removal. `again`: the step is saved a second time, over itself."""
    save(tmp_path, 5)
    if again:
        save(tmp_path, 10)
    calls = 0

    def mortal(function: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Died
            return function(*args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(Path, "rename", mortal(Path.rename))
        patch.setattr(shutil, "rmtree", mortal(shutil.rmtree))
        try:
            save(tmp_path, 10, keep=1, seed=1)
        except Died:
            ended = True
        else:
            ended = False
    assert ended == (calls == call)
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert skipped == []
    assert found.step in (5, 10)
    state = load_state(tmp_path, found.step, rank=0, world=1)
    wholes = [full_tensors(0), full_tensors(1)] if found.step == 10 else [full_tensors(0)]
    assert any(torch.equal(state.tensors["model/embed"], whole["model/embed"]) for whole in wholes)
    save(tmp_path, 10, keep=1, seed=1)  # the next attempt is not hindered
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_manifests_are_read_without_torch():
    code = "import sys, verst.training.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
