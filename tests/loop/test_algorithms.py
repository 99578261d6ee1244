"""Every algorithm as its example has it: one step of a whole run in this process, from the quickstart's model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.loop.local import LocalRun, local_run, prompts_file, stopped_after
from tests.loop.rewards import ranked, spread, tied_in_odd_groups
from verst.config.algorithms import PRESETS
from verst.journal.log import JournalReader
from verst.recipes.tiny import build_tiny_model
from verst.runtime.batching import assemble
from verst.runtime.rundir import RunDirectory

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "algorithms").glob("*.yaml"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("quickstart"))


def values_of(example: Path, directory: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The example's, smaller; and prompts of a file, since a task takes seconds to import."""
    values = yaml.safe_load(example.read_text())
    del values["model"], values["eval"], values["reward"]
    values["run"] = {"steps": 1}
    if "path" not in values["data"]:
        values["data"] = {"path": prompts_file(directory)}
    values["train"] |= {"groups_per_step": 4, "minibatches": min(values["train"].get("minibatches", 1), 2)}
    return values | {section: values.get(section, {}) | change for section, change in changes.items()}


def test_every_algorithm_has_an_example():
    assert {file.stem for file in EXAMPLES} | {"grpo", "sft"} == set(PRESETS)  # those two are the quickstart's
    for file in EXAMPLES:
        assert yaml.safe_load(file.read_text())["algorithm"]["name"] == file.stem == yaml.safe_load(file.read_text())["run"]["name"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
async def test_one_step_of_each_example(tmp_path: Path, quickstart: Path, example: Path):
    """A teacher is the model itself here; `tests/loop/test_distill.py` has another."""
    scored: dict[str, Any] = {} if example.stem == "dpo" else {"reward": spread}
    run = await local_run(tmp_path, quickstart, values_of(example, tmp_path, **_taught(example, quickstart)), **scored).go()
    (row,) = [row for row in run.rows if row.get("loss/total") is not None]
    assert np.isfinite(row["loss/total"])
    assert (row["update/grad_norm"] > 0) == (example.stem != "distill")
    assert row["update/skipped"] == 0
    compares = example.stem in ("dpo", "online_dpo")
    assert ("policy/reward_margin" in row) == compares
    weighs = not compares and example.stem != "best_of_n"
    assert ("policy/ratio" in row) == weighs
    assert ("policy/clipped_high" in row) == (weighs and example.stem not in ("rloo", "distill"))


def _taught(example: Path, teacher: Path) -> dict[str, dict[str, Any]]:
    return {"algorithm": {"teacher": str(teacher), "old_logprobs": "behaviour"}} if example.stem == "distill" else {}


def trained(run: LocalRun) -> list[tuple[list[float], list[float]]]:
    """For each group of the first step, the rewards of all its trajectories, and of those that were trained."""
    _, config = RunDirectory.open(run.run.root)
    journal = JournalReader(run.run.journal, run.run.run_id)
    groups = [journal.group(seq) for seq in journal.batch(1).groups]
    samples = assemble(1, groups, config.algorithm).samples
    return [([t.reward or 0.0 for t in g.trajectories], [s.reward for s in samples if s.group == g.seq]) for g in groups]


async def test_best_of_n_trains_one_of_each_group_and_none_of_a_bad_one(tmp_path: Path, quickstart: Path):
    (example,) = (file for file in EXAMPLES if file.stem == "best_of_n")
    values = values_of(example, tmp_path, rollout={"group_size": 3}, algorithm={"reward_above": 4})
    run = await local_run(tmp_path, quickstart, values, reward=spread).go()
    found = trained(run)
    assert len(found) == 4
    for rewards, chosen in found:
        assert chosen == [max(rewards)]
        assert max(rewards) > 4
    (row,) = [row for row in run.rows if row.get("loss/total") is not None]
    assert row["groups/replaced"] > 0


async def test_a_step_with_advantages_and_a_loss_of_ones_own(tmp_path: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES[0].parent)
    values = values_of(EXAMPLES[0].parent / "dr_grpo.yaml", tmp_path, algorithm={"advantages": "own:advantages", "loss": "own:loss"})
    run = await local_run(tmp_path, quickstart, values, reward=spread).go()
    (row,) = [row for row in run.rows if row.get("loss/total") is not None]
    assert row["policy/bounded"] >= 0
    assert "policy/clipped_high" not in row
    assert row["update/grad_norm"] > 0


async def test_online_dpo_trains_the_best_and_the_worst_and_no_tie(tmp_path: Path, quickstart: Path):
    values = values_of(EXAMPLES[0].parent / "online_dpo.yaml", tmp_path, rollout={"group_size": 3})
    run = await local_run(tmp_path, quickstart, values, reward=tied_in_odd_groups).go()
    found = trained(run)
    assert len(found) == 4
    for rewards, pair in found:
        assert rewards == [0.0, 1.0, 2.0]
        assert pair == [0.0, 2.0]
    (row,) = [row for row in run.rows if row.get("loss/total") is not None]
    assert row["groups/replaced"] == 3  # those between the four
    assert row["loss/total"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its own reference still


async def test_pairs_of_a_file_are_trained_again_with_the_same_bits_after_a_crash(tmp_path: Path, quickstart: Path):
    """Nothing is rolled or scored; the steps after the checkpoint come from the journal."""
    values = values_of(EXAMPLES[0].parent / "dpo.yaml", tmp_path, run={"steps": 4}, checkpoint={"every_steps": 2})
    values["train"] |= {"minibatches": 2, "microbatch_tokens": 140}
    whole = await local_run(tmp_path / "whole", quickstart, values).go()
    crashed = local_run(tmp_path / "crashed", quickstart, values)
    await stopped_after(crashed, 3)
    await crashed.go()
    digests = [[JournalReader(run.run.journal, run.run.run_id).commit(step).digest for step in range(1, 5)] for run in (whole, crashed)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 4
    margins = whole.metric("policy/reward_margin")
    assert margins[0] < margins[-1]
    assert "rollout/generated_tokens" not in whole.rows[-1] or whole.rows[-1]["rollout/generated_tokens"] == 0
    journal = JournalReader(whole.run.journal, whole.run.run_id)
    group = journal.group(journal.batch(1).groups[0])
    assert [t.reward for t in group.trajectories] == [1.0, 0.0]
    assert group.prompt.rejected[0].content == group.trajectories[1].completion


async def test_a_step_with_a_reward_that_compares_a_group(tmp_path: Path, quickstart: Path):
    values = values_of(EXAMPLES[0].parent / "dr_grpo.yaml", tmp_path)
    run = await local_run(tmp_path, quickstart, values, reward=ranked).go()
    for rewards, _ in trained(run):
        assert sorted(rewards) == list(range(8))
