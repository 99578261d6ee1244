"""Whole runs with real parts on a tiny model: what is journaled, trained, measured and exported belongs together."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.loop.local import LocalRun, local_run, stopped_after
from verst.errors import CheckpointError, ConfigError, DataError, ExtensionError, JournalError, VerstError
from verst.journal.log import Journal, JournalReader
from verst.testing import tiny_model
from verst.types import NO_VERSION, Completion, Message, Prompt, Reply, Status
from verst.weights.location import publish_directory

ROWS = [{"prompt": f"count {i}", "answer": str(i % 5)} for i in range(64)]


def vowels(trajectory: Any, fields: Any) -> float:
    """A reward that varies between the members of a group."""
    return float(sum(map(ord, trajectory.completion)) % 5)


pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path, _one_thread: None) -> LocalRun:
    """Three steps of the small configuration as it is."""
    run = local_run(tmp_path_factory.mktemp("plain"), model, {}, reward=vowels, prompts=ROWS)
    return asyncio.run(run.go())


async def test_grpo_end_to_end(tmp_path: Path, model: Path):
    values = {"data": {"holdout": 0.3, "max_prompt_tokens": 64}, "eval": {"every_steps": 2, "prompts": 4}, "checkpoint": {"every_steps": 2}}
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    steps = [r for r in run.rows if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3]
    assert len(run.metric("eval/reward")) == 3  # before the first step, after the second and the last
    assert run.metric("mismatch/abs_max") == [0.0, 0.0, 0.0]
    assert max(run.metric("mismatch/probe")) == 0.0
    assert run.metric("staleness/max") == [0, 0, 0]
    assert run.run.report.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sum(line.startswith("step ") for line in run.lines) == 3


def test_the_journal_is_the_trajectory_store(plain: LocalRun):
    reader = JournalReader(plain.run.journal)
    for step in (1, 2, 3):
        groups = [reader.group(seq) for seq in reader.batch(step).groups]
        assert len(groups) == 4
        for trajectory in (t for g in groups for t in g.trajectories):
            assert trajectory.status is not Status.FAILED
            assert trajectory.reward == vowels(trajectory, {})
            assert set(trajectory.versions_T[trajectory.loss_mask_T]) == {step - 1}
            assert set(trajectory.versions_T[~trajectory.loss_mask_T]) == {NO_VERSION}
            assert (trajectory.logprobs_T[trajectory.loss_mask_T] < 0).all()
            assert (trajectory.logprobs_T[~trajectory.loss_mask_T] == 0).all()


def test_the_exported_model_is_the_committed_one_and_transformers_loads_it(plain: LocalRun, model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from verst.types import TensorEntry
    from verst.weights.checksum import dtype_name, manifest_digest, tensor_checksum

    final = AutoModelForCausalLM.from_pretrained(plain.run.final)
    tensors = dict(final.named_parameters())
    entries = [TensorEntry(n, tuple(t.shape), dtype_name(t.dtype), tensor_checksum(t.detach()), t.nbytes) for n, t in tensors.items()]
    assert manifest_digest(entries) == JournalReader(plain.run.journal).commit(3).digest
    original = AutoModelForCausalLM.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(final.parameters(), original.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(plain.run.final).decode([72, 105]) == AutoTokenizer.from_pretrained(model).decode([72, 105])


async def test_sft_lowers_the_loss_and_samples_nothing(tmp_path: Path, model: Path):
    values = {
        "algorithm": {"name": "sft"},
        "run": {"name": "sft", "dir": str(tmp_path), "steps": 12, "seed": 1},
        "data": {"columns": {"demonstration": "answer"}, "max_prompt_tokens": 64},
        "train": {"groups_per_step": 16, "threads": 1, "lr": 5e-3},
    }
    run = await local_run(tmp_path, model, values, prompts=ROWS).go()
    losses = run.metric("loss/total")
    assert losses[-1] < 0.8 * losses[0]
    assert run.metric("reward") == []
    assert run.metric("staleness/max") == []


class TwoTurns:
    """Asks twice; the second question quotes the first answer's length."""

    async def start(self, prompt: Prompt) -> Sequence[Message]:
        return prompt.messages

    async def reply(self, completion: Completion) -> Reply:
        if not hasattr(self, "_asked"):
            self._asked = True
            return Reply((Message("user", f"you said {len(completion.text)} characters; again"),), done=False)
        return Reply(info={"second": completion.text})


async def test_two_turns_are_exact_to_the_token_and_trained(tmp_path: Path, model: Path):
    from transformers import AutoTokenizer

    values = {"rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "max_turns": 2}, "data": {"max_prompt_tokens": 128}}
    # the end of turn is likely under a model that was told so; here every turn that was cut by its limit ends the trajectory
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS, environment=TwoTurns).go()
    reader = JournalReader(run.run.journal)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trajectories = [t for step in (1, 2, 3) for seq in reader.batch(step).groups for t in reader.group(seq).trajectories]
    for t in trajectories:
        spans = np.zeros(len(t.tokens_T), bool)
        for turn in t.turns:
            spans[turn.generated : turn.end] = True
            assert tokenizer.decode(t.tokens_T[turn.generated : turn.end]).removesuffix("<|im_end|>") == turn.text
        assert (spans == t.loss_mask_T).all()


async def test_runs_ahead_with_a_larger_capacity(tmp_path: Path, model: Path):
    values = {
        "rollout": {"group_size": 4, "max_new_tokens": 6, "max_running": 16, "capacity_groups": 12},
        "algorithm": {"name": "grpo", "old_logprobs": "behaviour"},
        "run": {"name": "ahead", "dir": str(tmp_path), "steps": 5, "seed": 1},
    }
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    assert 1 <= max(run.metric("staleness/max")) <= 2


async def test_what_ends_last_is_cut_and_counted(tmp_path: Path, model: Path):
    values = {"run": {"deterministic": False}, "rollout": {"group_size": 4, "oversample": 2, "max_new_tokens": 24, "max_running": 24}}
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    journal = JournalReader(run.run.journal)
    groups = [journal.group(seq) for step in (1, 2, 3) for seq in journal.batch(step).groups]
    assert [len(group.trajectories) for group in groups] == [4] * 12
    assert [len(group.cut) for group in groups] == [2] * 12
    assert run.metric("rollout/cut") == pytest.approx([1 / 3] * 3)
    trained = [t.generated_tokens for group in groups for t in group.trajectories]
    every = [*trained, *(tokens for group in groups for tokens in group.cut)]
    assert run.metric("bias/length")[-1] == pytest.approx((sum(trained) / len(trained)) / (sum(every) / len(every)))


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
async def test_kl_against_the_reference_is_zero_at_first_and_then_measured(tmp_path: Path, model: Path, kl_in: str):
    values = {
        "algorithm": {"name": "grpo", "kl_coefficient": 0.05, "kl_in": kl_in},
        "train": {"groups_per_step": 4, "threads": 1, "lr": 5e-3, "minibatches": 2},
    }
    run = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    kl = run.metric("policy/kl")
    assert kl[-1] > kl[0] >= 0
    assert kl[0] < kl[-1] / 2


def digests(run: LocalRun) -> list[str]:
    reader = JournalReader(run.run.journal)
    return [reader.commit(s).digest for s in range(1, reader.index.last_commit + 1)]


@pytest.mark.slow
async def test_resume_gives_the_undisturbed_weights_and_repeats_no_rollout(tmp_path: Path, model: Path):
    values = {"checkpoint": {"every_steps": 2}, "run": {"name": "a", "dir": str(tmp_path), "steps": 5, "seed": 1}}
    whole = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    broken = local_run(tmp_path, model, values | {"run": values["run"] | {"name": "b"}}, reward=vowels, prompts=ROWS)
    await stopped_after(broken, 3)
    await broken.go()
    assert "resumed at step 2 (checkpoint): 1 journaled steps to train again" in " ".join(broken.lines)
    assert digests(broken) == digests(whole)
    assert sorted(JournalReader(broken.run.journal).index.groups) == list(range(20))  # each group once


@pytest.mark.slow
async def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path: Path, model: Path):
    values = {"checkpoint": {"every_steps": 1}, "run": {"name": "a", "dir": str(tmp_path), "steps": 4, "seed": 1}}
    whole = await local_run(tmp_path, model, values, reward=vowels, prompts=ROWS).go()
    broken = local_run(tmp_path, model, values | {"run": values["run"] | {"name": "b"}}, reward=vowels, prompts=ROWS)
    await stopped_after(broken, 3)
    newest = max(file.parent / "rank-00000-of-00001.safetensors" for file in broken.run.checkpoints.glob("step-????????/manifest.json"))
    newest.write_bytes(newest.read_bytes()[:-10])
    await broken.go()
    assert any("checkpoint skipped" in line and newest.parent.name in line for line in broken.lines)
    assert digests(broken) == digests(whole)


async def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, model: Path):
    values = {"checkpoint": {"every_steps": 1}, "run": {"name": "a", "dir": str(tmp_path), "steps": 2, "seed": 1}}
    run = await local_run(tmp_path, tiny_model(tmp_path / "m"), values, reward=vowels, prompts=ROWS).go()
    shutil.rmtree(tmp_path / "m")
    tiny_model(tmp_path / "m", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        await run.go()


async def test_a_journal_of_another_run_is_refused(tmp_path: Path, model: Path):
    run = local_run(tmp_path, model, {}, reward=vowels, prompts=ROWS)
    shutil.rmtree(run.run.journal)
    Journal.create(run.run.journal, "somebody else's run").close()
    with pytest.raises(JournalError, match="belongs to run"):
        await run.go()


async def test_a_full_disk_under_checkpoints_is_told_and_training_goes_on(tmp_path: Path, model: Path):
    run = local_run(tmp_path, model, {"checkpoint": {"every_steps": 1}}, reward=vowels, prompts=ROWS)
    run.run.checkpoints.rmdir()
    run.run.checkpoints.symlink_to("/dev/full")  # every write below it fails
    await run.go()
    assert sum("warning: checkpoint of step" in line for line in run.lines) >= 3
    assert JournalReader(run.run.journal).index.last_commit == 3


def raising(trajectory: Any, fields: Any) -> float:
    if int(fields["answer"]) == 3:
        raise KeyError("no such thing")
    return vowels(trajectory, fields)


async def test_a_reward_that_raises_is_counted_shown_and_never_a_zero(tmp_path: Path, model: Path):
    run = await local_run(tmp_path, model, {"run": {"name": "r", "dir": str(tmp_path), "steps": 4}}, reward=raising, prompts=ROWS).go()
    assert any("dropped: 4 of 4 trajectories failed" in line and "no such thing" in line for line in run.lines)
    reader = JournalReader(run.run.journal)
    failed = [t for seq in reader.index.groups for t in reader.group(seq).trajectories if t.status is Status.FAILED]
    assert failed
    assert all(t.reward is None and "no such thing" in (t.error or "") for t in failed)


async def test_a_reward_module_that_raises_at_import(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "badreward.py").write_text("raise RuntimeError('missing calibration file')\ndef score(trajectory, fields): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = local_run(tmp_path, model, {"reward": {"function": "badreward:score"}}, prompts=ROWS)
    with pytest.raises(ExtensionError, match=r"missing calibration file.*badreward\.py|badreward\.py.*missing calibration file"):
        await run.go()


async def test_a_prompt_over_the_limit_names_the_row(tmp_path: Path, model: Path):
    rows = [{"prompt": "x" * 500, "answer": "1"}]
    run = local_run(tmp_path, model, {}, reward=vowels, prompts=rows)
    with pytest.raises(DataError, match=r"data\.max_prompt_tokens"):
        await run.go()


def test_a_run_is_never_written_over(tmp_path: Path, model: Path):
    local_run(tmp_path, model, {}, reward=vowels, prompts=ROWS)
    with pytest.raises(ConfigError, match="exists already: continue it with `verst resume"):
        local_run(tmp_path, model, {}, reward=vowels, prompts=ROWS)


def test_sft_without_demonstrations_is_refused_before_anything_starts(tmp_path: Path, model: Path):
    with pytest.raises(ConfigError, match=r"data\.columns=\{demonstration: COLUMN\}"):
        local_run(tmp_path, model, {"algorithm": {"name": "sft"}}, prompts=ROWS)


async def test_a_function_that_makes_the_prompts_is_called_anew_on_resume(tmp_path: Path, model: Path):
    run = local_run(tmp_path, model, {"checkpoint": {"every_steps": 1}}, reward=vowels, prompts=lambda: iter(ROWS))
    await stopped_after(run, 2)
    await run.go()
    reader = JournalReader(run.run.journal)
    assert [reader.group(seq).prompt.messages[0].content for seq in range(12)] == [f"count {i}" for i in range(12)]


async def test_changed_data_is_refused_before_the_first_checkpoint_too(tmp_path: Path, model: Path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = local_run(tmp_path, model, {"data": {"path": str(data), "max_prompt_tokens": 64}}, reward=vowels)
    await stopped_after(run, 1)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with pytest.raises(DataError, match=r"the saved position in data\.jsonl does not fit: source was .*bytes"):
        await run.go()


def test_published_weights_are_gone_after_the_run(plain: LocalRun):
    assert not publish_directory(plain.run.run_id, None).exists()


def test_an_iterator_cannot_be_given_as_prompts(tmp_path: Path, model: Path):
    with pytest.raises(VerstError, match="an iterator can be read only once"):
        asyncio.run(local_run(tmp_path, model, {}, prompts=iter(ROWS)).go())
