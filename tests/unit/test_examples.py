"""`verst check` accepts every run file of examples/ on a machine without a GPU, in a directory that has what the file names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForSequenceClassification

from verst.cli import main
from verst.recipes.tiny import build_tiny_model, write_demonstrations
from verst.testing import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.rglob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that examples name."""
    place = tmp_path_factory.mktemp("place")
    model = build_tiny_model(place / "runs/quickstart/model")
    for name in ("sft", "grpo"):
        shutil.copytree(model, place / "runs/quickstart" / name / "final")
    for name in ("models/smollm2", "model"):
        tiny_model(place / name, max_position_embeddings=8192)
    write_demonstrations(place / "runs/quickstart/demonstrations.jsonl")
    (place / "examples").symlink_to(EXAMPLES)
    rows = [{"prompt": f"count {i}", "answer": str(i)} for i in range(2000)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(place / "reward-model", kind=LlamaForSequenceClassification, num_labels=1, max_position_embeddings=256)
    return place


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_an_example_checks(place: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.setenv("JUDGE_API_KEY", "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = yaml.safe_load(file.read_text())
    if values.get("train", {}).get("backend") == "megatron":  # which checks its own arguments, and changes the process that imports it
        done = subprocess.run([sys.executable, "-m", "verst.cli", "check", str(file)], capture_output=True, text=True, timeout=120)
        status, said = done.returncode, done.stdout + done.stderr
    else:
        status, said = main(["check", str(file)]), "".join(capsys.readouterr())
    assert status == 0, said
    assert f"name: {values['run']['name']}" in said
