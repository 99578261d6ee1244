"""Options that a resumed run may change, and those that it may not."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from verst.config.load import load_config, option_names
from verst.config.schema import Config
from verst.errors import ConfigError, RunLocked
from verst.journal.lock import RunLock
from verst.journal.log import Journal, JournalReader
from verst.journal.records import BatchRecord, CommitRecord
from verst.runtime import changes
from verst.runtime.changes import change
from verst.runtime.rundir import RunDirectory


def made(directory: Path, **train: Any) -> tuple[RunDirectory, Config]:
    values = {"run": {"name": "r", "dir": str(directory), "steps": 10}, "model": {"path": "m"}, "train": train}
    return RunDirectory.open(RunDirectory.create(load_config(values), None, {}).root)


def test_what_changes_is_told_recorded_and_read_back(tmp_path: Path):
    run, config = made(tmp_path)
    told: list[str] = []
    new = change(run, config, ["train.ranks=2", "run.steps=12", "train.threads=1"], told.append)
    assert (new.train.ranks, new.run.steps) == (2, 12)
    assert told == ["run.steps: 10 -> 12", "train.ranks: 1 -> 2"]
    reopened, read = RunDirectory.open(run.root)
    assert read == new
    (recorded,) = reopened.changes
    assert recorded["options"] == {"run.steps": [10, 12], "train.ranks": [1, 2]}
    assert json.loads((run.root / "run.json").read_text())["run_id"] == run.run_id
    again = change(reopened, read, ["run.steps=12", "train.ranks=1"], told.append)
    assert again.train.ranks == 1
    assert [list(c["options"]) for c in reopened.changes] == [["run.steps", "train.ranks"], ["train.ranks"]]
    change(reopened, again, ["train.ranks=1"], told.append)
    assert len(reopened.changes) == 2, "nothing changed, yet it was recorded"


def test_what_must_stay_is_refused_by_name_with_the_reason_and_nothing_is_written(tmp_path: Path):
    run, config = made(tmp_path)
    before = {path: path.read_bytes() for path in (run.config, run.root / "run.json")}
    overrides = ["train.lr=1", "model.path=other", "train.ranks=2", "data.task=chain_sum", "algorithm.clip_low=0.1", "rollout.top_k=2"]
    with pytest.raises(ConfigError) as refused:
        change(run, config, overrides, print)
    lines = str(refused.value).splitlines()
    assert [line.split(" ", 1)[0] for line in lines[:-1]] == [
        *("algorithm.clip_low", "data.task", "model.path", "rollout.top_k", "train.lr"),
    ]
    assert lines[2] == "model.path cannot be changed in a run: its checkpoints are of that model"
    assert "train.ranks" in lines[-1]
    assert before == {path: path.read_bytes() for path in before}


def test_more_steps_would_change_a_schedule_that_ends_with_them(tmp_path: Path):
    run, config = made(tmp_path, schedule="cosine")
    with pytest.raises(ConfigError, match=r"run\.steps cannot be changed in a run: train\.schedule cosine reaches 0 at run\.steps"):
        change(run, config, ["run.steps=12"], print)


def test_of_megatrons_arguments_only_the_layout_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verst.runtime.preflight.check_stack", lambda config: None)  # which needs the model's files
    run, config = made(tmp_path, backend="megatron", ranks=2, megatron={"tensor-model-parallel-size": 2})
    overrides = ["train.megatron.pipeline_model_parallel_size=2", "train.megatron.tensor-model-parallel-size=1"]
    new = change(run, config, overrides, print)
    assert new.train.megatron == {"tensor-model-parallel-size": 1, "pipeline_model_parallel_size": 2}
    (recorded,) = run.changes
    assert recorded["options"] == {
        "train.megatron.pipeline_model_parallel_size": [None, 2],
        "train.megatron.tensor_model_parallel_size": [2, 1],
    }
    with pytest.raises(
        ConfigError, match=r"train\.megatron\.moe_aux_loss_coeff cannot be changed in a run: it may change what is computed"
    ):
        change(run, new, ["train.megatron.moe_aux_loss_coeff=0.1"], print)


def test_new_values_are_checked_as_those_of_a_run_file_are(tmp_path: Path):
    run, config = made(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown option train\.rank; did you mean train\.ranks"):
        change(run, config, ["train.rank=2"], print)
    with pytest.raises(ConfigError, match=r"eval\.every_steps needs data\.holdout"):
        change(run, config, ["eval.every_steps=2"], print)


def test_a_living_run_cannot_be_changed(tmp_path: Path):
    run, config = made(tmp_path)
    with RunLock(run.root), pytest.raises(RunLocked):
        change(run, config, ["train.ranks=2"], print)
    assert run.changes == []


def test_every_option_has_an_answer():
    """A new section would otherwise end a resume with a KeyError."""
    config = load_config({"run": {"steps": 1}, "model": {"path": "m"}})
    names = option_names()
    assert {name for name in names if changes._reason(name, config) is None} == changes.CHANGEABLE


def test_only_steps_committed_before_a_change_come_out_with_other_bits(tmp_path: Path):
    run, config = made(tmp_path)
    for steps, override in ((3, "train.ranks=2"), (5, "run.steps=20"), (5, "train.threads=2")):
        with closing(Journal.open(run.journal, run.run_id)) as journal:
            for step in range(journal.index.last_commit + 1, steps + 1):
                journal.append_batch(BatchRecord(step, ()))
                journal.append_commit(CommitRecord(step, "hash"))
        config = change(run, config, [override], print)
    assert [recorded["step"] for recorded in run.changes] == [3, 5, 5]
    assert changes.reordered_since(run, 2) == {"train.ranks", "train.threads"}
    assert changes.reordered_since(run, 3) == {"train.threads"}  # steps 4 and 5 were trained on two ranks, as they would be now
    assert changes.reordered_since(run, 5) == set()


@pytest.mark.parametrize("when", ["run.json.partial", "config.yaml.partial"])
def test_a_full_disk_leaves_the_run_as_it_was(tmp_path: Path, when: str):
    run, config = made(tmp_path)
    before = run.config.read_bytes()
    (run.root / when).symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"could not be written \(No space left on device\)"):
        change(run, config, ["train.ranks=2"], print)
    assert run.config.read_bytes() == before
    (run.root / when).unlink()
    assert change(run, config, ["train.ranks=2"], print).train.ranks == 2


def test_the_journal_has_each_change_once(tmp_path: Path):
    """A run that is opened anew writes what it has not: changes made in between, or lost with the end of the journal."""
    run, config = made(tmp_path)
    for override in ("run.steps=20", "train.ranks=2"):
        config = change(run, config, [override], print)
        with closing(Journal.open(run.journal, run.run_id)) as journal:
            changes.journal_changes(run, journal)
            changes.journal_changes(run, journal)
    found = JournalReader(run.journal, run.run_id).changes()
    assert [(record.step, record.options) for record in found] == [(0, {"run.steps": [10, 20]}), (0, {"train.ranks": [1, 2]})]
