"""The shipped reward model against transformers itself."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from verst.config.load import load_config
from verst.errors import ExtensionError, RewardFailure
from verst.rewards.reward_model import RewardModel
from verst.rewards.scorer import Scorer
from verst.rewards.spec import RewardSpec
from verst.testing import tiny_model
from verst.types import FinishReason, Group, Message, Prompt, Status, Trajectory, Turn

EXAMPLE = Path(__file__).parents[2] / "examples/rewards/reward_model.yaml"
TEXTS = ("1", "a much longer answer, which decides how far the others are padded", "22", "no", "why not")


def write(directory: Path, kind: Any = LlamaForSequenceClassification, **overrides: Any) -> Path:
    return tiny_model(directory, kind=kind, **{"num_labels": 1, "max_position_embeddings": 256} | overrides)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("reward-model"))


def said(text: str, member: int = 0) -> Trajectory:
    arrays = np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32)
    messages = (Message("user", "6 * 7?"), Message("assistant", text))
    return Trajectory(f"0/{member}", *arrays, (Turn(0, 0, 1, FinishReason.STOP, text),), messages, Status.FINISHED, 0)


def expected(path: Path, text: str) -> float:
    """One conversation alone, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.inference_mode():
        return LlamaForSequenceClassification.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits.item()


async def test_what_arrives_together_is_one_batch_and_scores_as_transformers_does(path: Path, monkeypatch: pytest.MonkeyPatch):
    model = RewardModel(str(path), max_batch=4)
    model.open()
    sizes: list[int] = []
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda rows: (sizes.append(len(rows)), forward(rows))[1])
    scores = await asyncio.gather(*(model(said(text), {}) for text in TEXTS))
    assert sizes == [4, 1]
    assert scores == pytest.approx([expected(path, text) for text in TEXTS], abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(TEXTS)


async def test_the_example_scores_in_its_process_and_fails_alone(path: Path):
    reward = load_config(yaml.safe_load(EXAMPLE.read_text())).reward
    scorer = Scorer(RewardSpec(reward.function, {**reward.options, "path": str(path)}), workers=1, deadline_s=60)
    await scorer.start()
    try:
        texts = ("22", "x " * 300)
        scored = await scorer.score(Group(0, Prompt("p:0", ()), tuple(said(text, i) for i, text in enumerate(texts)), 0))
    finally:
        scorer.close()
    assert scored.trajectories[0].reward == pytest.approx(expected(path, "22"), abs=1e-5)
    assert "tokens, and the reward model takes 256" in str(scored.trajectories[1].error)


async def test_a_batch_that_breaks_fails_those_in_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    model = RewardModel(str(path))
    model.open()
    forward = model._forward

    def broken(rows: Any) -> list[float]:
        monkeypatch.setattr(model, "_forward", forward)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "_forward", broken)
    with pytest.raises(RewardFailure, match="broke on a batch of 1: RuntimeError: out of memory"):
        await model(said("1"), {})
    assert await model(said("1"), {}) == pytest.approx(expected(path, "1"), abs=1e-5)


async def test_whatever_a_forward_pass_raises_is_told_to_its_batch_at_once(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Embeddings on a CPU raise IndexError, which is no RuntimeError: nobody may be left to wait for a score that cannot come."""
    model = RewardModel(str(path), max_batch=2)
    model.open()
    forward, broken = model._forward, [IndexError("index out of range in self")]
    monkeypatch.setattr(model, "_forward", lambda rows: (_ for _ in ()).throw(broken.pop()) if broken else forward(rows))
    asked = asyncio.gather(*(model(said(text), {}) for text in ("1", "22", "no")), return_exceptions=True)
    *failed, score = await asyncio.wait_for(asked, 20)
    assert [str(failure) for failure in failed] == ["the reward model broke on a batch of 2: IndexError: index out of range in self"] * 2
    assert all(isinstance(failure, RewardFailure) for failure in failed)
    assert score == pytest.approx(expected(path, "no"), abs=1e-5)
    assert await model(said("1"), {}) == pytest.approx(expected(path, "1"), abs=1e-5)


async def test_a_token_that_the_model_does_not_know_fails_its_conversation_alone(path: Path, tmp_path: Path):
    """On a GPU it would break the process with all that is in it."""
    known = len(AutoTokenizer.from_pretrained(path))
    odd = write(tmp_path / "odd")
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(odd)
    LlamaForSequenceClassification.from_pretrained(path).save_pretrained(odd)
    model = RewardModel(str(odd))
    model.open()
    right, wrong = await asyncio.wait_for(asyncio.gather(*(model(said(t), {}) for t in ("22", "<later>")), return_exceptions=True), 20)
    assert right == pytest.approx(expected(path, "22"), abs=1e-5)
    assert isinstance(wrong, RewardFailure)
    assert str(wrong) == f"the conversation has token {known}, and the reward model knows those below {known}"
    tokenizer.pad_token = "<later>"
    tokenizer.save_pretrained(odd)
    with pytest.raises(ExtensionError, match=f"pads with token {known}, and knows those below {known}"):
        RewardModel(str(odd)).open()


def test_what_is_no_reward_model(tmp_path: Path):
    with pytest.raises(ExtensionError, match=r"has no config\.json"):
        RewardModel(str(tmp_path))
    with pytest.raises(ExtensionError, match="has 3 labels: a reward model has one"):
        RewardModel(str(write(tmp_path / "three", num_labels=3))).open()
    with pytest.raises(ExtensionError, match=r"has no weights for score\.weight"):
        RewardModel(str(write(tmp_path / "causal", LlamaForCausalLM))).open()
    with pytest.raises(ExtensionError, match="device is 'tpu'"):
        RewardModel(str(tmp_path / "causal"), device="tpu")
    with pytest.raises(ExtensionError, match="dtype is 'int8'"):
        RewardModel(str(tmp_path / "causal"), dtype="int8")


def test_a_gpu_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExtensionError, match=r"this process has no GPU: give it one by reward\.actor_gpus"):
        RewardModel(str(path), device="cuda").open()


def test_without_a_padding_token_nothing_is_padded(path: Path, tmp_path: Path):
    bare = write(tmp_path / "bare", pad_token_id=None)
    about = json.loads((bare / "tokenizer_config.json").read_text())
    about.pop("pad_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(about))
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ExtensionError, match="has no padding token"):
        RewardModel(str(bare)).open()
    alone = RewardModel(str(bare), max_batch=1)
    alone.open()
    assert asyncio.run(alone(said("22"), {})) == pytest.approx(expected(path, "22"), abs=1e-5)
