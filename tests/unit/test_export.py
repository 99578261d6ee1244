"""`verst export`: a directory that transformers loads, with the very weights that were committed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.loop.local import LocalRun
from verst import cli
from verst.config.load import load_config
from verst.errors import CheckpointError, ConfigError
from verst.journal.log import JournalReader
from verst.runtime.exporting import digest_of, digest_of_directory, export_run
from verst.runtime.stored import parse_reference
from verst.training.checkpoints import CheckpointWriter, commit_checkpoint, fingerprint, load_state, verified
from verst.training.state import RankState
from verst.training.whole import whole_tensors


def digest(run: LocalRun, step: int) -> str:
    return JournalReader(run.run.journal).commit(step).digest


def test_the_last_step_is_the_final_export(done_run: LocalRun, tmp_path: Path):
    made = export_run(done_run.run.root, tmp_path / "out")
    assert (made.step, made.source, made.digest) == (4, "final", digest(done_run, 4))
    assert digest_of_directory(tmp_path / "out") == digest(done_run, 4)
    assert not (tmp_path / "out.partial").exists()


def test_a_checkpoint_becomes_a_model_with_the_committed_weights(done_run: LocalRun, tmp_path: Path, tiny: Path):
    made = export_run(done_run.run.root, tmp_path / "two", step=2)
    assert (made.step, made.source) == (2, "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert digest_of(dict(model.named_parameters())) == digest(done_run, 2) != digest(done_run, 4)
    assert AutoTokenizer.from_pretrained(tmp_path / "two").decode([72, 105]) == AutoTokenizer.from_pretrained(tiny).decode([72, 105])


def test_the_checkpoint_of_the_last_step_gives_the_bits_of_the_final_export(done_run: LocalRun, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy)
    shutil.rmtree(copy / "final")
    assert export_run(copy, tmp_path / "out").source == "checkpoint"
    ours, theirs = (p / "model.safetensors" for p in (tmp_path / "out", done_run.run.final))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_final_export_of_an_earlier_end_is_not_taken(done_run: LocalRun, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy)
    shutil.rmtree(copy / "final")
    export_run(done_run.run.root, copy / "final", step=2)
    made = export_run(copy, tmp_path / "out")
    assert (made.source, made.digest) == ("checkpoint", digest(done_run, 4))


def test_weights_that_were_not_committed_are_refused(done_run: LocalRun, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(done_run.run.root, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("dtype: float32", "dtype: bfloat16"))
    with pytest.raises(CheckpointError, match=r"the journal committed .* for step 2: .*model\.dtype is not what it was"):
        export_run(copy, tmp_path / "out", step=2)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_says_what_can(done_run: LocalRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(CheckpointError, match="no checkpoint of step 3: its checkpoints are of: 2, 4"):
        export_run(done_run.run.root, tmp_path / "out", step=3)
    with pytest.raises(ConfigError, match="not a run"):
        export_run(tmp_path, tmp_path / "out")
    assert cli.main(["export", str(done_run.run.root), "--out", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_run_is_named_with_or_without_a_step(tmp_path: Path):
    assert parse_reference("runs/a@12") == (Path("runs/a"), 12)
    assert parse_reference("runs/a") == (Path("runs/a"), None)
    (tmp_path / "at@home").mkdir()
    assert parse_reference(str(tmp_path / "at@home")) == (tmp_path / "at@home", None)
    with pytest.raises(ConfigError, match="a whole number, as in runs/a@40"):
        parse_reference("runs/a@last")


def test_shards_of_several_ranks_are_joined_and_rounded(done_run: LocalRun, tmp_path: Path):
    """Rows cut by hand from the full masters, written as three ranks would, read back whole; bfloat16 as PyTorch rounds."""
    full = load_state(done_run.run.checkpoints, 2, rank=0, world=1)
    records, states = [], []
    for rank in range(3):
        parts = {n: (t.tensor_split([2, 17])[rank] if t.shape[0] > 17 else t) for n, t in full.tensors.items()}
        states.append(RankState(parts, full.values, full.full_shapes))
        writer = CheckpointWriter(tmp_path, 2, rank=rank, world=3)
        writer.begin(states[-1])
        records.append(writer.finish())
    path = commit_checkpoint(tmp_path, 2, records, fingerprint=fingerprint(states[0]), loop={}, keep=1)
    for dtype in ("float32", "bfloat16"):
        config = load_config(done_run.run.config, [f"model.dtype={dtype}"])
        found = dict(whole_tensors(verified(path), config))
        assert found
        for name, tensor in found.items():
            assert torch.equal(tensor, full.tensors[f"model/{name}"].to(getattr(torch, dtype)))
