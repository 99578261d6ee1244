"""The benchmark of training speed: its count of operations is torch's own, and a combination that fails does not end the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.train_mfu import SHAPES, Shape, batches, main, parsed, table, write_model

SMALL = ["--shape", "tiny", "--tokens", "16", "--microbatch", "2", "--steps", "2", "--warmup", "1"]


def test_operations_are_those_that_torch_counts(tmp_path: Path):
    shape = SHAPES["tiny"]
    write_model(shape, tmp_path, longest=24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.arange(24)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.float().sum().backward()
    attention = 6 * shape.layers * shape.heads * shape.head * 24**2  # torch multiplies the whole square, causality needs half
    rotary = 2 * 24 * shape.head // 2  # the angles of the rotary embedding are a matrix product too; it has no backward
    assert shape.flops([24]) + attention + rotary == counter.get_total_flops()


def test_operations_worked_by_hand():
    shape = Shape(hidden=4, intermediate=8, layers=2, heads=2, groups=1, head=3, vocabulary=10)
    # A layer: queries and output 2 · 4 · 6, keys and values 2 · 4 · 3, MLP 3 · 4 · 8: 168. Two layers and the head of 40: 376.
    assert shape.multiplied == 376
    assert shape.flops([5, 7]) == 6 * 376 * 12 + 6 * 2 * 6 * (25 + 49)
    # Per token at 4,096: as measured before for these shapes, 4.985 and 11.73 GFLOP.
    assert SHAPES["0.6b"].flops([4096]) / 4096 == pytest.approx(4.985e9, rel=1e-3)
    assert SHAPES["1.7b"].flops([4096]) / 4096 == pytest.approx(11.73e9, rel=1e-3)


def test_samples_have_the_inputs_that_were_asked_for():
    options = parsed([*SMALL, "--microbatches", "3"])
    samples = next(batches(options, 50)).samples
    assert [len(s.tokens_T) - 1 for s in samples] == [16] * 6
    assert all(s.loss_mask_T.sum() == 16 for s in samples)
    ragged = [len(s.tokens_T) - 1 for s in next(batches(parsed([*SMALL, "--microbatches", "20", "--ragged"]), 50)).samples]
    assert min(ragged) >= 8
    assert max(ragged) <= 16
    assert len(set(ragged)) > 3


def test_a_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["train_mfu.py", *SMALL, "--backend", "fsdp", "--profile", str(tmp_path), "--name", "cpu"])
    main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = result["runs"]
    assert (run["shape"], run["backend"], run["mfu"], run["peak_gib"]) == ("tiny", "fsdp", None, None)
    assert run["tok_s"] == pytest.approx(32 / run["step_s"], rel=0.5)
    assert sum(run["phases_s"].values()) == pytest.approx(run["step_s"], rel=0.5)
    assert (result["tokens"], result["microbatch"], result["compile"]) == (16, 2, False)
    assert "aten::mm" in (tmp_path / "tiny-fsdp-cpu.txt").read_text()


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    wrong = ["--set", "train.megatron.lr=1", "--backend", "fsdp", "megatron"]  # fsdp has no such section, megatron no such freedom
    monkeypatch.setattr(sys, "argv", ["train_mfu.py", *SMALL, *wrong])
    main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert [run["backend"] for run in json.loads(last)["runs"]] == ["fsdp", "megatron"]
    assert "train.megatron does not apply" in lines[1]
    assert "failed: verst.errors.ConfigError" in lines[2]


def test_the_table_shows_shares_of_the_peak():
    phases = {"load_batch": 0.01, "forward_backward": 0.3, "optimizer_step": 0.09}
    figures = {"mfu": 0.4567, "tok_s": 41234.0, "step_s": 0.4, "peak_gib": 41.26, "graphs": 2, "phases_s": phases}
    good = {"shape": "1.7b", "backend": "fsdp"} | figures
    lines = table([good, {"shape": "1.7b", "backend": "megatron", "error": "out of memory"}])
    assert lines[1].split() == ["1.7b", "fsdp", "45.7", "41,234", "400.0", "300.0", "90.0", "41.3", "2"]
    assert lines[2].split(maxsplit=2) == ["1.7b", "megatron", "failed: out of memory"]
